"""Labels and inputs of every integer type: never a silent wrong value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grsd_jax as grsd
from grsd_jax.errors import half_squared_loss, softmax_cross_entropy
from oracles import dense_kernel, relative_error

C = 259  # bytes and three marks: more classes than a byte can count
NARROW = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
NAMED = ("softmax_cross_entropy", "squared")


def outputs_fn(params, batch):
    return jnp.tanh(batch["x"]) @ params["w"]


def make(labels, classes=3, **options):
    """Returns a problem of K = 2 batches of N = 3 examples, and its parameters."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    params = {"w": jax.random.normal(jax.random.key(1), (5, classes))}
    problem = grsd.Problem(outputs_fn, {"x": x, "label": labels}, **options)
    return problem, params


LABELS = np.array([[0, 2, 1], [1, 1, 0]])


def errors(logits, labels):
    """Returns softmax minus one-hot, by NumPy in float64."""
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) - np.eye(z.shape[-1])[labels]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_narrow_labels_do_not_wrap(dtype, convert):
    logits = jax.random.normal(jax.random.key(0), (3, C))
    largest = min(np.iinfo(dtype).max, C - 1)
    labels = np.array([0, 1, largest])
    given = convert(labels.astype(dtype))
    expected = errors(logits, labels)
    for error in (grsd.softmax_error, jax.jit(grsd.softmax_error)):
        np.testing.assert_allclose(error(logits, given), expected, atol=1e-6)
    for loss in (softmax_cross_entropy, jax.jit(softmax_cross_entropy)):
        np.testing.assert_allclose(
            loss(logits, given), loss(logits, labels.astype(np.int32))
        )
    wide = grsd.squared_error(logits, labels.astype(np.int32))
    np.testing.assert_array_equal(jax.jit(grsd.squared_error)(logits, given), wide)


def test_labels_of_two_classes_may_be_truths():
    logits = jax.random.normal(jax.random.key(0), (3, 2))
    labels = np.array([True, False, True])
    expected = grsd.softmax_error(logits, labels.astype(int))
    np.testing.assert_array_equal(grsd.softmax_error(logits, labels), expected)
    one_hot = np.eye(2, dtype=bool)[labels.astype(int)]
    np.testing.assert_array_equal(grsd.softmax_error(logits, one_hot), expected)


@pytest.mark.parametrize("error", [grsd.softmax_error, grsd.squared_error])
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.array([0, 3], np.uint8), r"from 0 to 3, the first at \[1\]"),
        (np.array([-128, 1], np.int8), r"from -128 to 1, the first at \[0\]"),
        (np.array([1, 2**32 + 1]), r"the first at \[1\]"),  # wraps to 1 in 32 bits
    ],
)
def test_labels_out_of_range_are_named_by_index(error, labels, found):
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=rf"expected classes in \[0, 3\), .*{found}"):
        error(logits, labels)


@pytest.mark.not_in_mode("debug_nans")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_labels_out_of_range_poison_what_is_traced(dtype):
    logits = jnp.zeros((2, 3))
    labels = jnp.asarray([0, 100], dtype)
    got = jax.jit(grsd.softmax_error)(logits, labels)
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [False, True])
    loss = jax.jit(softmax_cross_entropy)(logits, labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True])
    loss = jax.jit(half_squared_loss)(logits, labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True])


@pytest.mark.not_in_mode("debug_nans")
def test_integers_of_the_shape_of_the_outputs_have_to_be_one_hot():
    logits = jnp.zeros((2, 2, 2))  # N, positions, C: labels [N, 2] would be classes
    rows = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]])
    classes = np.argmax(rows, -1)
    expected = grsd.softmax_error(logits, classes)
    np.testing.assert_array_equal(grsd.softmax_error(logits, rows), expected)
    # One set of outputs with a label a position, where their numbers coincide.
    message = r"labels: expected one-hot rows, .* is not one-hot at \[1\]"
    wrong = np.array([[1, 0], [0, 0]])
    with pytest.raises(ValueError, match=message):
        grsd.softmax_error(logits[0], wrong)
    traced = jax.jit(grsd.softmax_error)(logits[0], wrong * 1.0 > 0)
    traced = jax.jit(grsd.softmax_error)(logits[0], jnp.asarray(wrong))
    np.testing.assert_array_equal(np.isnan(traced), [[False] * 2, [True] * 2])
    # A regression to counts is none of a softmax's business.
    counts = np.array([[3, 0], [7, -2]])
    np.testing.assert_array_equal(grsd.squared_error(logits[0], counts), -counts)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1.0], np.float32), "of float32; classes have to be integers"),
        (np.array([0, 1j]), "expected real numbers, got complex"),
        (
            np.array(["a", "b"]),
            "expected an array of numbers, got .* dtype <U1",
        ),
        ({"y": np.zeros(2, int)}, "expected an array of numbers, got dict"),
        (None, "expected an array of numbers, got NoneType"),
    ],
)
def test_what_can_be_no_label_is_one_sentence(labels, message):
    with pytest.raises(ValueError, match=f"^labels: .*{message}"):
        grsd.softmax_error(jnp.zeros((2, 3)), labels)


def test_soft_targets_need_not_sum_to_one():
    """A row of zeros, as `jax.nn.one_hot` makes of -100, does not count."""
    logits = jax.random.normal(jax.random.key(0), (4, 3))
    targets = jnp.array([[0, 0, 0], [0.2, 0.3, 0], [1, 1, 0], [0.1, 0.8, 0.1]])
    for error, loss in (
        (grsd.softmax_error, softmax_cross_entropy),
        (grsd.squared_error, half_squared_loss),
    ):
        got = error(logits, targets)
        gradient = jax.grad(lambda z, loss=loss: jnp.sum(loss(z, targets)))(logits)
        np.testing.assert_allclose(got, gradient, atol=1e-6)
    np.testing.assert_array_equal(grsd.softmax_error(logits, targets)[0], 0)


# At the door of a problem.


def uses(problem, params):
    """Returns what uses a problem by name."""
    block = jnp.ones((18, 2))
    direction = jax.tree.map(jnp.ones_like, params)
    key = {"key": jax.random.key(0)}
    return {
        "dimension": lambda: problem.dimension(params),
        "loss": lambda: problem.loss(params),
        "explain": lambda: problem.explain(params),
        "error": lambda: problem.error(
            params, jax.tree.map(lambda leaf: leaf[1], problem.batches)
        ),
        "flow": lambda: grsd.gradient_flow_direction(problem, params),
        "dense": lambda: grsd.kernel_dense(problem, params),
        "layers": lambda: grsd.layer_kernels(problem, params),
        "matmat": lambda: grsd.kernel_matmat(problem, params, block),
        "linearize": lambda: grsd.linearize_kernel(problem, params),
        "derivative": lambda: grsd.kernel_derivative(problem, params, direction, block),
        "measure": lambda: grsd.measure_coupling(problem, params, direction, **key),
        "probe": lambda: grsd.make_probe(problem, every=1).init(
            jax.random.key(0), params
        ),
    }


@pytest.mark.parametrize("loss", NAMED)
@pytest.mark.parametrize("name", uses(*make(LABELS)))
def test_a_label_out_of_range_is_named_wherever_a_problem_is_used(name, loss):
    wrong = LABELS.copy()
    wrong[1, 2] = 3
    problem, params = make(wrong, loss=loss)
    where = r"\[0, 2\]" if name == "error" else r"\[1, 2\]"
    message = rf"^batches\['label'\]: expected classes in \[0, 3\), .* at {where}"
    with pytest.raises(ValueError, match=message):
        uses(problem, params)[name]()


def test_labels_that_a_function_finds_are_checked_too():
    shifted = lambda batch: batch["label"] + 1  # noqa: E731
    problem, params = make(LABELS, target=shifted)
    with pytest.raises(ValueError, match=r"^target: expected classes .* at \[0, 1\]"):
        problem.loss(params)
    assert make(LABELS, classes=4, target=shifted)[0].loss is not None


def test_labels_of_a_loss_of_the_users_own_are_left_alone():
    def masked(outputs, label):  # -100 marks what does not count, as elsewhere
        losses = softmax_cross_entropy(outputs, jnp.maximum(label, 0))
        return jnp.sum(jnp.where(label >= 0, losses, 0))

    labels = np.array([[[0, -100], [2, 1], [-100, -100]]])
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 5))
    params = {"w": jax.random.normal(jax.random.key(1), (5, 3))}
    batches = {"x": x, "label": labels}
    problem = grsd.Problem(outputs_fn, batches, loss=masked)
    kernel = grsd.kernel_dense(problem, params)
    assert relative_error(kernel, dense_kernel(problem, params)) < 1e-5
    blocks = np.asarray(kernel).reshape(3, 2, 3, 3, 2, 3)
    assert not blocks[2].any()  # an example of padding alone
    assert not blocks[0, 1].any()
    named = problem.replace(loss="softmax_cross_entropy")
    with pytest.raises(ValueError, match=r"expected classes .* the first at \[0, 0, 1"):
        named.loss(params)


@pytest.mark.not_in_mode("debug_nans")
def test_under_jit_a_label_out_of_range_shows_as_not_finite():
    wrong = jnp.asarray(LABELS).at[1, 2].set(3).at[0, 1].set(-1)
    problem, params = make(wrong)
    shells = grsd.Binning(num_shells=2, window=2, num_bootstrap=0)

    @jax.jit
    def measure(problem, params, direction=None):
        return grsd.measure_coupling(
            problem,
            params,
            direction,
            key=jax.random.key(0),
            solver="dense",
            shells=shells,
        )

    direction = jax.tree.map(jnp.ones_like, params)
    for given in (None, direction):
        measured = measure(problem, params, given)
        assert not measured.finite
        assert not measured.resolved.any()
        assert measured.num_misfits == 2
        assert "such as classes out of range: 2." in measured.caveats[0]
        right = problem.replace(batches={**problem.batches, "label": LABELS})
        assert measure(right, params, given).finite
        assert measure(right, params, given).num_misfits == 0
    assert np.isnan(jax.jit(lambda p, q: p.loss(q))(problem, params))


# Inputs that are no floating numbers.


def features(name):
    rng = np.random.default_rng(0)
    if name == "bool":
        return rng.random((2, 3, 5)) < 0.5
    return rng.integers(0, 100, (2, 3, 5)).astype(name)


@pytest.mark.parametrize("name", ["bool", "uint8", "int32"])
def test_inputs_of_every_integer_type_move_with_the_rest(name):
    """Their tangents are of the type float0, which must not meet the others."""
    x = features(name)

    def scaled(params, batch):
        x = batch["x"].astype(params["w"].dtype) / 64
        return jnp.tanh(x @ params["w"])

    problem, params = make(LABELS)
    problem = problem.replace(outputs_fn=scaled, batches={"x": x, "label": LABELS})
    floating = {"x": x.astype(np.float64), "label": LABELS}
    same = problem.replace(batches=floating)
    direction = grsd.gradient_flow_direction(problem, params)
    got = grsd.kernel_dense(problem, params, direction)
    expected = grsd.kernel_dense(same, params, direction)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-6
    oracle = jax.jvp(lambda p: dense_kernel(same, p), (params,), (direction,))
    assert relative_error(got[1], oracle[1]) < 1e-5
    projected = grsd.kernel_derivative(problem, params, direction, jnp.eye(18))
    assert relative_error(projected, oracle[1]) < 1e-5


def test_a_direction_may_hold_tangents_of_integer_parameters():
    def outputs(params, batch):
        return batch["x"] @ params["w"][:, params["order"]]

    problem, params = make(LABELS)
    problem = problem.replace(outputs_fn=outputs)
    params = {**params, "order": jnp.array([2, 0, 1])}
    gradient = jax.grad(problem.loss, allow_int=True)(params)
    assert gradient["order"].dtype == jax.dtypes.float0
    direction = {"w": -gradient["w"], "order": gradient["order"]}
    kernel, moved = grsd.kernel_dense(problem, params, direction)
    own = grsd.gradient_flow_direction(problem, params)
    expected = grsd.kernel_dense(problem, params, own)
    assert relative_error(kernel, expected[0]) < 1e-6
    assert relative_error(moved, expected[1]) < 1e-6


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_negative_indices_read_from_the_end(convert):
    """Their rows are those that JAX reads, in the factors too."""
    tokens = convert(np.array([[[-1, 8], [8, -1], [0, -9]], [[1, 2], [-3, 6], [4, 4]]]))

    def embedded(params, batch):
        rows = params["table"][batch["x"]]
        return jnp.tanh(rows.reshape(rows.shape[0], -1)) @ params["w"]

    problem, _ = make(LABELS)
    problem = problem.replace(
        outputs_fn=embedded, batches={"x": tokens, "label": LABELS}
    )
    params = {
        "table": jax.random.normal(jax.random.key(0), (9, 4)),
        "w": jax.random.normal(jax.random.key(1), (8, 3)),
    }
    expected = dense_kernel(problem, params)
    assert relative_error(grsd.kernel_dense(problem, params), expected) < 1e-5
    linearized = grsd.linearize_kernel(problem, params)
    assert relative_error(linearized.matmat(jnp.eye(18)), expected) < 1e-5
