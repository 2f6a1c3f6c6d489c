"""PPO on gymnax's CartPole or Acrobot: dense, static and RigL networks of several widths.

    pip install gymnax six
    python examples/reinforcement_learning.py --env=Acrobot-v1 --widths=64,256 --seeds=3

The whole of training, environments included, is one compiled program. Sparse networks of a width
have a tenth of the connections of the dense one. Graesser et al., "The state of sparse training in
deep reinforcement learning", 2022, find that they keep working where dense networks of the same
number of weights fail; compare the rows.
"""

import argparse
import functools
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax

ENVIRONMENTS, ROLLOUT, EPOCHS, BATCHES = 16, 128, 4, 4
DISCOUNT, LAMBDA, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01


class Transition(NamedTuple):
    """One step of all environments."""

    seen: jax.Array
    action: jax.Array
    reward: jax.Array
    done: jax.Array
    log_prob: jax.Array
    value: jax.Array


def init(key: jax.Array, inputs: int, width: int, actions: int) -> dict:
    """Draws an actor and a critic, of two hidden layers each."""
    draw = jax.nn.initializers.orthogonal
    params = {}
    for name, outputs, last in (("actor", actions, 0.01), ("critic", 1, 1.0)):
        key, *keys = jax.random.split(key, 4)
        sizes = (inputs, width, width, outputs)
        params[name] = {
            f"layer{i}": {
                "kernel": draw(last if i == 2 else 2**0.5)(keys[i], sizes[i : i + 2]),
                "bias": jnp.zeros(sizes[i + 1]),
            }
            for i in range(3)
        }
    return params


def mlp(layers: dict, x: jax.Array) -> jax.Array:
    """Maps (batch, inputs) to (batch, outputs)."""
    for name in ("layer0", "layer1"):
        x = jnp.tanh(x @ layers[name]["kernel"] + layers[name]["bias"])
    return x @ layers["layer2"]["kernel"] + layers["layer2"]["bias"]


def wrapped(method: str, updates: int) -> optax.GradientTransformation:
    """Returns Adam of so many steps, dense or sparse."""
    adam = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adam(optax.linear_schedule(1e-3, 0, updates), eps=1e-5),
    )
    # The first and last kernels have few weights: they stay dense.
    layers = rigl_optax.uniform(0.9, dense=rigl_optax.DenseLayers({"layer[02]": "few weights"}))
    if method == "dense":
        return adam
    if method == "static":
        return rigl_optax.static_sparse(adam, layers)
    return rigl_optax.rigl(adam, layers, end=3 * updates // 4, every=50)


def advantages(steps: Transition, last: jax.Array) -> jax.Array:
    """Computes generalised advantage estimates, backwards in time."""

    def back(after, step):
        advantage, value = after
        alive = 1.0 - step.done
        delta = step.reward + DISCOUNT * value * alive - step.value
        advantage = delta + DISCOUNT * LAMBDA * alive * advantage
        return (advantage, step.value), advantage

    return jax.lax.scan(back, (jnp.zeros_like(last), last), steps, reverse=True)[1]


def loss(params: dict, batch: tuple[Transition, jax.Array, jax.Array]) -> jax.Array:
    """Returns PPO's clipped loss, with those of the critic and of the entropy."""
    steps, advantage, target = batch
    log_probs = jax.nn.log_softmax(mlp(params["actor"], steps.seen))
    log_prob = jnp.take_along_axis(log_probs, steps.action[:, None], 1)[:, 0]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = jnp.exp(log_prob - steps.log_prob)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    actor = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    critic = jnp.square(mlp(params["critic"], steps.seen)[:, 0] - target).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    return actor + 0.5 * critic - ENTROPY * entropy


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def train(key: jax.Array, env_name: str, method: str, width: int, rollouts: int) -> Any:
    """Trains; returns the state and, by rollout, the mean reward of an episode that ended."""
    env, setting = gymnax.make(env_name)
    key, reset_key, init_key = jax.random.split(key, 3)
    seen, world = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, ENVIRONMENTS), setting)
    params = init(init_key, seen.shape[-1], width, env.num_actions)
    tx = wrapped(method, rollouts * EPOCHS * BATCHES)
    opt_state = tx.init(params)
    if method != "dense":
        params = rigl_optax.apply_masks(params, opt_state)

    def act(carry, key):
        params, world, seen = carry
        draw_key, step_key = jax.random.split(key)
        logits = mlp(params["actor"], seen)
        action = jax.random.categorical(draw_key, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        value = mlp(params["critic"], seen)[:, 0]
        after, world, reward, ended, cut, _ = jax.vmap(env.step, (0, 0, 0, None))(
            jax.random.split(step_key, ENVIRONMENTS), world, action, setting
        )
        done = (ended | cut).astype(jnp.float32)
        return (params, world, after), Transition(seen, action, reward, done, log_prob, value)

    def descend(carry, batch):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def rollout(carry, key):
        params, opt_state, world, seen, running = carry
        act_key, *shuffles = jax.random.split(key, 1 + EPOCHS)
        (_, world, seen), steps = jax.lax.scan(
            act, (params, world, seen), jax.random.split(act_key, ROLLOUT)
        )
        advantage = advantages(steps, mlp(params["critic"], seen)[:, 0])
        everything = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (steps, advantage, advantage + steps.value)
        )
        order = jnp.concatenate(
            [jax.random.permutation(k, ENVIRONMENTS * ROLLOUT) for k in shuffles]
        )
        batches = jax.tree.map(
            lambda x: x[order].reshape(EPOCHS * BATCHES, -1, *x.shape[1:]), everything
        )
        (params, opt_state), _ = jax.lax.scan(descend, (params, opt_state), batches)

        def add(running, step):
            total = running + step.reward
            return total * (1 - step.done), (total * step.done, step.done)

        running, (returns, ended) = jax.lax.scan(add, running, steps)
        episodes = jnp.stack([returns.sum(), ended.sum()])
        return (params, opt_state, world, seen, running), episodes

    carry = (params, opt_state, world, seen, jnp.zeros(ENVIRONMENTS))
    (params, opt_state, *_), episodes = jax.lax.scan(
        rollout, carry, jax.random.split(key, rollouts)
    )
    return params, opt_state, episodes


def score(env: str, method: str, width: int, seed: int, rollouts: int) -> tuple[float, int]:
    """Trains one network; returns its mean return over the last tenth, and its connections."""
    params, opt_state, episodes = train(jax.random.key(seed), env, method, width, rollouts)
    if method != "dense":
        rigl_optax.check(params, opt_state)
    total, number = np.asarray(episodes[-max(1, rollouts // 10) :]).sum(0)
    connections = sum(
        int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(params) if leaf.ndim == 2
    )
    return float(total / max(number, 1)), connections


def main(
    rollouts: int = 100,
    env: str = "CartPole-v1",
    widths: tuple[int, ...] = (64, 256),
    seeds: int = 1,
) -> dict[tuple[str, int], float]:
    """Prints a row for each method and width; returns the mean return of each."""
    found = {}
    for width in widths:
        for method in ("dense", "static", "rigl"):
            scores = [score(env, method, width, seed, rollouts) for seed in range(seeds)]
            returns = [value for value, _ in scores]
            found[method, width] = float(np.mean(returns))
            print(
                f"{env}  width {width:5d}  {method:6}  {scores[0][1]:7,} connections  "
                f"return {np.mean(returns):7.1f} ± {np.std(returns, ddof=min(1, seeds - 1)):.1f}"
            )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--widths", default="64,256")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rollouts", type=int, default=100)
    args = parser.parse_args()
    main(args.rollouts, args.env, tuple(map(int, args.widths.split(","))), args.seeds)
