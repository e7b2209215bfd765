import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grsd_jax import (
    Problem,
    gradient_flow_direction,
    kernel_dense,
    kernel_matmat,
)
from grsd_jax.errors import (
    half_squared_loss,
    softmax_basis,
    softmax_cross_entropy,
    softmax_error,
    squared_error,
)

LOGITS = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
LABELS = np.array([2, 0])


@pytest.mark.parametrize(
    ("error", "loss"),
    [(softmax_error, softmax_cross_entropy), (squared_error, half_squared_loss)],
)
def test_error_is_the_gradient_of_its_loss(error, loss):
    gradient = jax.grad(lambda z: jnp.sum(loss(z, LABELS)))(LOGITS)
    np.testing.assert_allclose(error(LOGITS, LABELS), gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "loss"),
    [(softmax_error, softmax_cross_entropy), (squared_error, half_squared_loss)],
)
def test_positions_between_examples_and_classes_are_errors_of_their_own(error, loss):
    outputs = jax.random.normal(jax.random.key(0), (4, 2, 3))
    labels = np.array([[0, 1], [2, 0], [1, 1], [2, 2]])
    got = error(outputs, labels)
    assert got.shape == (4, 2, 3)
    flat = error(outputs.reshape(8, 3), labels.reshape(8))
    np.testing.assert_allclose(got.reshape(8, 3), flat, atol=1e-7)
    of_positions = loss(outputs.reshape(8, 3), labels.reshape(8))
    np.testing.assert_allclose(
        jnp.sum(loss(outputs, labels)), jnp.sum(of_positions), rtol=1e-6
    )


def test_one_number_an_example_has_a_squared_error():
    outputs, targets = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    np.testing.assert_allclose(squared_error(outputs, targets), [0.5, -3.0])
    np.testing.assert_allclose(half_squared_loss(outputs, targets), [0.125, 4.5])


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_the_basis_holds_the_motion_of_a_softmax_error(num_classes):
    basis = softmax_basis(num_classes)
    assert basis.shape == (num_classes, max(num_classes - 1, 1))
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-15)
    if num_classes > 1:
        np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-15)


@pytest.mark.parametrize("error", [softmax_error, squared_error])
def test_one_hot_and_integer_labels_agree(error):
    one_hot = np.eye(3)[LABELS]
    expected = error(LOGITS, LABELS)
    np.testing.assert_array_equal(error(LOGITS, one_hot.astype(np.float32)), expected)
    np.testing.assert_array_equal(error(LOGITS, one_hot.astype(int)), expected)


def test_values():
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        softmax_error(LOGITS, LABELS), softmax - np.eye(3)[LABELS], atol=1e-6
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(LOGITS, LABELS),
        -np.log(softmax[[0, 1], LABELS]),
        rtol=1e-6,
    )


FITTED = np.array([[18.0, 1.0, 0.5], [-2.0, 30.0, -1.0], [-18.0, 2.0, 1.0]])
FITTED_LABELS = np.array([0, 1, 0])  # two fitted to 1e-7 and 1e-14, one all wrong


def softmax_parts(dtype):
    """Returns error, both Jacobians, its derivative, loss and gradient, in float64."""
    z = jnp.asarray(FITTED, dtype)

    def error(z):
        return softmax_error(z, FITTED_LABELS)

    def total(z):
        return jnp.sum(softmax_cross_entropy(z, FITTED_LABELS))

    forward, reverse = jax.jacfwd(error)(z), jax.jacrev(error)(z)
    moved = jax.jvp(jax.jacrev(error), (z,), (jnp.ones_like(z).at[:, 0].set(2.0),))[1]
    loss = softmax_cross_entropy(z, FITTED_LABELS)
    parts = error(z), forward, reverse, moved, loss, jax.grad(total)(z)
    return [np.asarray(part, np.float64) for part in parts]


def test_nothing_cancels_for_a_fitted_example():
    # Every single entry: in float32 the plain formulas are wrong by up to 100%.
    single = softmax_parts(jnp.float32)
    with jax.enable_x64(True):
        double = softmax_parts(jnp.float64)
    for got, expected in zip(single, double, strict=True):
        np.testing.assert_allclose(got, expected, rtol=5e-6)
    error, forward, _, _, loss, gradient = double
    others = np.exp(FITTED[:2] - FITTED[:2].max(axis=1, keepdims=True))
    others[[0, 1], [0, 1]] = 0
    left = others.sum(axis=1)
    np.testing.assert_allclose(loss[:2], np.log1p(left), rtol=1e-12)
    np.testing.assert_allclose(error[[0, 1], [0, 1]], -left / (1 + left), rtol=1e-12)
    np.testing.assert_allclose(gradient, error, rtol=1e-12)
    curvature = forward[[0, 1], [0, 1], [0, 1], [0, 1]]  # p (1 - p) of the label
    np.testing.assert_allclose(curvature, left / (1 + left) ** 2, rtol=1e-12)


def test_the_kernel_of_a_fitted_example_is_that_of_float64():
    def kernel(dtype):
        batches = {"x": jnp.eye(3, dtype=dtype)[None], "label": FITTED_LABELS[None]}
        problem = Problem(lambda w, batch: batch["x"] @ w, batches)
        weights = jnp.asarray(FITTED, dtype)
        dense = kernel_dense(problem, weights)
        product = kernel_matmat(problem, weights, jnp.eye(9, dtype=dtype))
        flow = gradient_flow_direction(problem, weights)
        return [np.asarray(part, np.float64) for part in (dense, product, flow)]

    single = kernel(jnp.float32)
    with jax.enable_x64(True):
        double = kernel(jnp.float64)
    for got, expected in zip(single[:2], double[:2], strict=True):
        sizes = np.sqrt(expected.diagonal().reshape(3, 3).max(axis=1)).repeat(3)
        error = np.abs(got - expected) / np.outer(sizes, sizes)
        assert np.max(error) < 5e-6
    np.testing.assert_allclose(single[2], double[2], rtol=5e-6)


@pytest.mark.parametrize(
    "function",
    [softmax_error, squared_error, softmax_cross_entropy, half_squared_loss],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_raised_before_the_error_is_formed(function, dtype):
    outputs = LOGITS.astype(dtype)
    got = function(outputs, LABELS)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, function(outputs.astype(jnp.float32), LABELS))


@pytest.mark.not_in_mode("debug_nans")
def test_infinite_logits_spoil_their_own_row_alone():
    infinite = jnp.array([[jnp.inf, 0.0, 1.0], [0.0, 1.0, 2.0]])
    assert np.isnan(softmax_error(infinite, LABELS)[0]).all()
    assert np.isfinite(softmax_error(infinite, LABELS)[1]).all()
    assert not np.isfinite(softmax_cross_entropy(infinite, LABELS)[0])


def test_hostile_logits():
    masked = jnp.array([[-jnp.inf, 0.0, 1.0], [3.0, -jnp.inf, -jnp.inf]])
    kept = masked.at[0, 0].set(-800.0).at[1, 1:].set(-800.0)
    for function in (softmax_error, softmax_cross_entropy):
        np.testing.assert_array_equal(function(masked, LABELS), function(kept, LABELS))
        gradient = jax.grad(lambda z, f=function: jnp.sum(f(z, LABELS) ** 2))(masked)
        assert np.isfinite(gradient).all()
    one = jnp.array([[3.0], [-1e30]])
    np.testing.assert_array_equal(softmax_error(one, np.zeros(2, int)), 0)
    np.testing.assert_array_equal(softmax_cross_entropy(one, np.zeros(2, int)), 0)
    huge = jnp.array([[1e30, -1e30, 0.0]])
    np.testing.assert_array_equal(softmax_error(huge, np.array([0])), 0)


@pytest.mark.not_in_mode("debug_nans")
def test_labels_out_of_range_are_named_or_poisoned():
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 3\)"):
        softmax_error(LOGITS, np.array([0, 3]))
    with pytest.raises(ValueError, match="got values from -1 to 0"):
        squared_error(LOGITS, np.array([0, -1]))
    traced = jax.jit(softmax_error)(LOGITS, jnp.array([0, 3]))
    np.testing.assert_array_equal(np.isnan(traced), [[False] * 3, [True] * 3])


def test_bad_shapes_and_dtypes_are_named():
    with pytest.raises(ValueError, match=r"labels: expected shape \[2\], got \[3\]"):
        softmax_error(LOGITS, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"labels: expected shape \[2, 3\]"):
        softmax_error(LOGITS, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="logits: expected a real floating dtype"):
        softmax_error(jnp.zeros((2, 3), jnp.int32), LABELS)
    with pytest.raises(ValueError, match=r"targets: expected shape \[2\], got \[3\]"):
        squared_error(LOGITS, np.zeros(3, int))
    with pytest.raises(ValueError, match="logits: expected at least 2 axes"):
        softmax_error(LOGITS[0], LABELS[:1])
