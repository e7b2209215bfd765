import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import Problem, kernel_dense, models
from oracles import MLP

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def shapes(make, **options):
    model = make(**options)
    images = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("make", [models.ResNet18, models.PlainNet18])
def test_published_parameter_count(make):
    assert count(shapes(make)["params"]) == 11_173_962


def test_both_networks_have_one_tree():
    resnet, plain = shapes(models.ResNet18), shapes(models.PlainNet18)
    assert jax.tree.structure(resnet) == jax.tree.structure(plain)
    assert jax.tree.leaves(resnet) == jax.tree.leaves(plain)


def test_one_checkpoint_loads_into_both_and_the_skip_is_the_difference():
    resnet, plain = models.ResNet18(width=2), models.PlainNet18(width=2)
    variables = jax.jit(resnet.init)(jax.random.key(0), IMAGES)
    assert not np.allclose(
        jax.jit(resnet.apply)(variables, IMAGES),
        jax.jit(plain.apply)(variables, IMAGES),
    )
    outputs_fn = models.linen_outputs(plain, {"batch_stats": variables["batch_stats"]})
    batches = {"image": IMAGES[None], "label": jnp.zeros((1, 2), jnp.int32)}
    problem = Problem(outputs_fn, batches)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)

    def norms():
        error, pullback = jax.vjp(
            lambda p: problem.error(p, batch), variables["params"]
        )
        (pulled,) = pullback(jax.random.normal(jax.random.key(1), error.shape))
        flat = jax.tree_util.tree_leaves_with_path(pulled)
        return {jax.tree_util.keystr(path): float(jnp.abs(x).sum()) for path, x in flat}

    unused = norms()
    assert all((size == 0) == ("shortcut" in name) for name, size in unused.items())
    assert any("shortcut" in name for name in unused)


def test_evaluation_mode_treats_examples_independently():
    model = models.ResNet18(width=2)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    both = model.apply(variables, IMAGES, train=False)
    one = model.apply(variables, IMAGES[:1], train=False)
    np.testing.assert_allclose(both[:1], one, atol=1e-5)


def test_outputs_are_a_pytree_with_a_visible_model():
    model = MLP()
    outputs_fn = models.linen_outputs(model, {})
    assert outputs_fn.model is model
    assert jax.tree.leaves(outputs_fn) == []
    state = {"batch_stats": {"mean": jnp.ones(2)}}
    with_state = models.linen_outputs(model, state)
    other = models.linen_outputs(model, jax.tree.map(lambda x: 2 * x, state))
    assert jax.tree.structure(with_state) == jax.tree.structure(other)
    hash(jax.tree.structure(with_state))


def test_any_linen_module_becomes_a_problem():
    model = MLP()
    images = jnp.ones((1, 2, 4))
    params = jax.jit(model.init)(jax.random.key(0), images[0])["params"]
    batches = {"image": images, "label": jnp.zeros((1, 2), jnp.int32)}
    problem = Problem(models.linen_outputs(model, {}), batches)
    assert kernel_dense(problem, params).shape == (6, 6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="activation: expected one of 'relu'"):
        models.ResNet18(activation="sine")
    with pytest.raises(ValueError, match="width: expected an integer >= 1"):
        models.PlainNet18(width=0)
    with pytest.raises(ValueError, match=r"x: expected images \[N, H, W, channels\]"):
        models.ResNet18(width=2).init(jax.random.key(0), jnp.ones((8, 8, 3)))
    with pytest.raises(ValueError, match="state: expected the non-parameter"):
        models.linen_outputs(MLP(), {"params": {}})
    with pytest.raises(ValueError, match="state: expected the non-parameter"):
        models.linen_outputs(MLP(), None)
