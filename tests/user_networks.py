"""The small networks that the engine is held against, as users bring them.

Each is a function that returns ``(outputs_fn, params, batch)``: one batch of a few
examples with the inputs under ``"x"`` and the targets under ``"label"``, outputs
``[N, C]`` or ``[N, T, C]``, and parameters in the default float dtype.
"""

import framework_networks as framework
import plain_networks as plain
import sequence_networks as sequence

#: The networks of which every leaf has factors, with the number of their leaves.
FACTORED = {
    plain.mlp_with_gain: 4,
    plain.jit_inside: 4,
    plain.custom_jvp_activation: 2,
    plain.custom_vjp_activation: 2,
    plain.quantised_weights: 2,
    plain.checkpointed_mlp: 3,
    plain.named_call_mlp: 3,
    plain.vmap_over_examples: 3,
    plain.vmap_over_parameters: 2,
    plain.constants_closed_over: 2,
    plain.integer_and_bool_inputs: 3,
    plain.dictionaries_and_lists_of_layers: 9,
    plain.cnn_strided: 4,
    plain.cnn_dilated: 2,
    plain.cnn_grouped: 3,
    plain.cnn_depthwise: 3,
    plain.cnn_channels_first: 3,
    plain.cnn_transposed: 3,
    plain.cnn_causal_in_time: 3,
    plain.cnn_pooled: 4,
    plain.shared_by_layers: 3,
    plain.shared_in_two_roles: 3,
    plain.shared_with_learned_queries: 3,
    plain.slices_of_one_vector: 1,
    plain.concatenated_and_stacked: 5,
    plain.split_after_one_product: 2,
    plain.transposed_and_reshaped: 3,
    plain.broadcast_rows: 4,
    plain.einsum_weights: 4,
    plain.bilinear_form: 2,
    plain.learned_position: 4,
    plain.temperature: 3,
    plain.quadratic_in_a_parameter: 3,
    plain.product_of_two_parameters: 3,
    plain.exponential_scale: 3,
    plain.symmetrised_weight: 2,
    plain.unused_parameter: 3,
    plain.parameter_as_output: 2,
    plain.selected_parameters: 5,
    plain.lora: 3,
    plain.lora_with_the_weight_trained: 4,
    plain.lora_by_activations: 3,
    plain.weight_norm: 4,
    plain.weight_standardisation: 3,
    plain.spectral_norm: 2,
    plain.mixture_of_experts: 4,
    plain.layers_stacked_under_scan: 3,
    plain.fori_loop_over_layers: 2,
    sequence.gpt: 16,
    sequence.gpt_scanned: 9,
    sequence.gpt_scanned_and_remat: 9,
    sequence.gpt_remat: 16,
    sequence.rnn_unrolled: 4,
    sequence.rnn_scanned: 4,
    sequence.rnn_scanned_with_a_learned_start: 5,
    sequence.gru_unrolled: 4,
    sequence.gru_scanned: 4,
    sequence.recurrent_layers_scanned: 5,
    framework.nnx_mlp: 4,
    framework.nnx_cnn: 10,
    framework.nnx_gru: 5,
    framework.nnx_scanned_layers: 6,
    framework.linen_resnet18: 62,
    framework.linen_vision_transformer: 39,
    framework.linen_transformer: 16,
    framework.linen_scanned_layers: 16,
    framework.linen_remat: 16,
    framework.linen_gru: 12,
    framework.linen_weight_norm: 5,
    framework.equinox_mlp: 6,
    framework.equinox_cnn: 10,
    framework.equinox_transformer: 9,
    framework.equinox_gru: 6,
    framework.haiku_mlp: 6,
    framework.haiku_resnet: 38,
    framework.haiku_transformer: 15,
    framework.haiku_lstm: 4,
    framework.haiku_layer_stack: 4,
}

#: Networks whose leaves may be differentiated plainly; their numbers have to be right.
BEYOND = {
    plain.custom_jvp_with_a_parameter: 2,
    plain.stopped_gradient: 2,
    plain.orthogonal_weight: 2,
    plain.mixture_of_experts_top_one: 3,
    plain.branch_on_data: 3,
    plain.switch_on_a_constant: 2,
    plain.derivative_of_a_network: 2,
    plain.gradient_of_an_energy: 2,
    plain.distances_to_prototypes: 3,
    plain.power_by_a_parameter: 3,
    sequence.linear_state_space: 3,
}

#: Networks that round inside to a lower precision, of which every leaf has factors.
#: `jax.nn.dot_product_attention`, which NNX calls, takes its softmax in float32.
LOW_PRECISION = {
    plain.bfloat16_compute: 4,
    sequence.gpt2_style: 13,
    framework.nnx_transformer: 16,
}

NETWORKS = {build.__name__: build for build in (*FACTORED, *BEYOND)}

#: Networks that take long to compile.
SLOW = {name for name, build in NETWORKS.items() if build.__module__ != plain.__name__}
