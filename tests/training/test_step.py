import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rigl_optax.data import batches
from rigl_optax.models import mobilenet_v1, resnet
from rigl_optax.training import architectures, evaluation, representation, setup, step
from rigl_optax.training import config as config_lib


def batch(config, run, at):
    return batches.training_batch(run.dataset.train, config.batch_size, seed=config.seed, step=at)


def loss_by_hand(params, images, labels):
    x = jnp.asarray(images.reshape(len(images), -1), jnp.float32) / 16
    for i in range(3):
        x = x @ params["layers"][i]["kernel"] + params["layers"][i]["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    losses = jax.nn.logsumexp(x, -1) - x[jnp.arange(len(labels)), labels]
    return losses.mean(), jnp.sum(x.argmax(-1) == labels)


@pytest.mark.parametrize("method", ["dense", "rigl"])
def test_steps_are_the_transformation_applied_to_the_gradients_of_the_loss(small, method):
    config = config_lib.changed(small, {"method.name": method})
    run = setup.prepare(config)
    state = jax.tree.map(jnp.copy, run.initial._replace(history=None))
    train_step = step.make_train_step(run)
    params, opt_state = run.initial.params, run.initial.opt_state
    losses = []
    for at in range(12):  # rewirings at 0 and 10
        data = batch(config, run, at)
        state = train_step(state, data)
        (loss, _), grads = jax.value_and_grad(loss_by_hand, has_aux=True)(
            params, data["images"], data["labels"]
        )
        losses.append(float(loss))
        updates, opt_state = run.tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # The sums began anew after step 10.
    assert float(state.sums.examples) == 2 * config.batch_size
    np.testing.assert_allclose(
        state.sums.loss / state.sums.examples, np.mean(losses[-2:]), rtol=1e-4
    )
    assert int(state.step) == 12


def test_the_step_compiles_once(small):
    run = setup.prepare(small)
    train_step = step.make_train_step(run)
    state = jax.tree.map(jnp.copy, run.initial._replace(history=None))
    for at in range(3):
        state = train_step(state, batch(small, run, at))
    assert train_step._cache_size() == 1


class MasksItself(nnx.Module):
    """Multiplies its kernel by where it is not zero: gradients are as sparse as weights."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (64, 10)))

    def __call__(self, images):
        kernel = self.kernel[...]
        return images.reshape(len(images), -1) @ (kernel * (kernel != 0))


def test_growth_without_gradients_outside_the_mask_is_noticed(small, monkeypatch):
    # A score from masked gradients grows weights in index order (google-research/rigl, issue 14).
    def blind_after_one_step():
        run = setup.prepare(small)
        state = jax.tree.map(jnp.copy, run.initial._replace(history=None))
        return int(step.make_train_step(run)(state, batch(small, run, 0)).sums.unseeing)

    assert blind_after_one_step() == 0
    made = architectures.Architecture(lambda *args, dtype, rngs: MasksItself(rngs), open=True)
    monkeypatch.setitem(architectures.ARCHITECTURES, "lenet", made)
    assert blind_after_one_step() == 1


def test_inactive_weights_that_all_belong_to_dead_units_of_one_layer_are_no_alarm():
    # Seen on Fashion-MNIST: 82 inactive weights of 100x10, all at dead hidden units.
    masks = {"a": jnp.array([[True, False]]), "b": jnp.array([[True, False]])}
    dead, alive = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    assert int(representation.no_gradient_outside(masks, {"a": dead, "b": alive})) == 0
    assert int(representation.no_gradient_outside(masks, {"a": dead, "b": dead})) == 1
    assert int(representation.no_gradient_outside({"a": jnp.ones((1, 2), bool)}, {"a": dead})) == 0


def test_evaluation_equals_the_mean_over_all_examples(small):
    run = setup.prepare(small)
    split = run.dataset.validation  # 297 examples: the last batch of 128 is not full
    found = evaluation.evaluator(run)(run.initial, split)
    loss, correct = loss_by_hand(run.initial.params, split.images, split.labels)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert found["accuracy"] == int(correct) / 297


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v1"])
def accelerated(request, vision):
    """A run of a network of few blocks, and its compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, 18, ((1, 1, 1, 1), False))
        patch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:3])
        config = config_lib.changed(
            vision,
            {
                "model.name": request.param,
                "model.width": 1 / 8,
                "method.every": 2,
                "method.distribution": {"name": "uniform"},
            },
        )
        run = setup.prepare(config)
        take = step.make_train_step(run)
        yield config, run, take


def test_a_step_moves_nothing_between_host_and_device_and_compiles_once(accelerated):
    config, run, take = accelerated
    device = jax.devices()[0]
    given = [jax.device_put(run.task.training_batch(config, i), device) for i in range(4)]
    state = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
    for batch in given[:2]:
        state = take(state, batch)
    with jax.transfer_guard("disallow"):
        for batch in given[2:]:  # step 2 rewires
            state = take(state, batch)
        jax.block_until_ready(state)
    assert take._cache_size() == 1
    assert int(state.opt_state.rewirings) == 2 and np.isfinite(float(state.sums.loss))


def test_a_step_lowers_for_accelerators(accelerated):
    config, run, take = accelerated
    batch = run.placement.put(run.task.training_batch(config, 0))
    exported = jax.export.export(take, platforms=["tpu", "cuda"])(
        run.initial._replace(history=None), batch
    )
    assert exported.platforms == ("tpu", "cuda")
    assert "stablehlo.convolution" in exported.mlir_module()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(vision):
    config = config_lib.changed(vision, {"model.dtype": "bfloat16", "method.name": "dense"})
    run = setup.prepare(config)
    floats = (run.initial.params, run.initial.model_state, run.initial.opt_state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(floats)}
    assert kinds == {"float32", "int32", "uint32"}
    take = step.make_train_step(run)
    batch = run.placement.put(run.task.training_batch(config, 0))
    text = str(jax.make_jaxpr(take)(run.initial._replace(history=None), batch))
    found = [line for line in text.splitlines() if "conv_general_dilated[" in line]
    assert found and all(":bf16" in line for line in found)
