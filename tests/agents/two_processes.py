"""Train agents in one process, and in two that share the batches; run by test_processes.py.

The three are forks of this one, which imports everything once and starts no thread. Arguments: the
folder where they meet and write, JSON of the cases.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fewstep.agents import (
    DMD,
    SFD,
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    ConsistencyDistillation,
    Denoiser,
    ProgressiveDistillation,
)
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.agents.solvers import make_solver
from fewstep.common.optimisation import seeded
from fewstep.critics import MMDCritic
from fewstep.envs import Target, make_mdp, make_target

AGENTS = {
    "cloning": BehaviorCloning,
    "sft": SFT,
    "sft-pg": SFTPG,
    "sft-v": SFTV,
    "sfd": SFD,
    "pd": ProgressiveDistillation,
    "cd": ConsistencyDistillation,
    "dmd": DMD,
}


def train(case: dict, count: int, rounds: int) -> dict[str, torch.Tensor]:
    """Return the weights after some rounds; batches are shared among `count` processes."""
    conditional = case.get("conditional", False)
    digits = make_target("Digits")
    texts = [f"the digit {label}" for label in digits.labels.tolist()]
    target = Target("Digits", digits.samples, labels=digits.labels, captions=texts)
    known = {"inpaint": case.get("inpaint"), "conditional": conditional}
    mdp = make_mdp("Digits", steps=4, target=target, **known)
    with seeded(0):
        body = ResidualMLP(mdp.shape, hidden=16, blocks=1, conditions=mdp.conditions)
        if case["agent"] == "cd":  # a network that answers 0 is consistent
            torch.nn.init.normal_(body.out.weight, std=0.1)
    denoiser = Denoiser(body, mdp.process, "sample", drops=bool(conditional))
    if conditional:
        denoiser = denoiser.given(guidance=case.get("guidance", 1.0))
    settings = dict(case["settings"])
    for name in ("batch_size", "minibatch_size"):
        if name in settings:
            settings[name] //= count
    if case.get("reward") == "mmd":
        settings["critic"] = MMDCritic(mdp.target.samples, max_real=64)
    if case.get("learned"):
        # Of all kinds that are learned: other weights, and times told that are not the states'.
        base = make_solver("dpm-solver++-3m", mdp.schedule)
        told = base.times[:-1] - [0.0, 0.1, 0.2, 0.1]
        settings["tableau"] = base.replace(weights=1.02 * base.weights, asked_times=told)
    agent = AGENTS[case["agent"]](mdp, denoiser, **settings)
    # Adam divides by the size of the gradient: where that is rounding alone, so is its step. With a
    # large epsilon the steps are smooth in the gradients.
    critic = getattr(getattr(agent, "critic", None), "optimizer", None)
    for optimizer in (agent.optimizer, getattr(agent, "fake_optimizer", None), critic):
        for group in optimizer.param_groups if optimizer else ():
            group["eps"] = 1.0
    if rounds:  # agents that count their calls are stopped before their own end
        agent.learn(None, lambda _locals, _globals: agent.rounds < rounds, log_interval=1)
    weights = {f"denoiser.{k}": v for k, v in agent.denoiser.state_dict().items()}
    if hasattr(agent, "critic"):
        state = agent.critic.state_dict()
        weights |= {f"critic.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    weights["timesteps"] = torch.tensor([agent.num_timesteps])
    return {key: value.clone().contiguous() for key, value in weights.items()}


def train_all(rank: int, count: int, folder: Path, cases: dict) -> None:
    torch.set_num_threads(1)
    if count > 1:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    tensors = {}
    for name, case in cases.items():
        for rounds in (0, 3):
            weights = train(case, count, rounds)
            tensors |= {f"{name}/{rounds}/{key}": value for key, value in weights.items()}
    save_file(tensors, folder / f"{count}-{rank}")
    if count > 1:
        dist.destroy_process_group()


def main(folder: Path, cases: dict) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=train_all, args=(rank, count, folder, cases), daemon=True)
        for rank, count in ((0, 1), (0, 2), (1, 2))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    # Those that still wait for a lost one end with this process.
    sys.exit(any(process.exitcode != 0 for process in processes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
