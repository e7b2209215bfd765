import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
