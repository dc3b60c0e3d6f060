"""DeepSpeed behind one file: a sharded or replicated module to train, and what sharding asks of its callers.

Under ZeRO-3 every forward pass gathers parameters from all ranks, so all ranks must make the same number of passes;
`lockstep` sees to that. Knows nothing of users, files or Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plora_ray.errors import ConfigError

Sharding = Literal["zero3", "replicated"]
Offload = Literal["none", "cpu", "nvme"]
Item = TypeVar("Item")

SHARD_ABOVE_SHARE = 0.5  # of a device's memory: beyond it a replicated frozen model leaves too little for activations
MOMENTS = ("exp_avg", "exp_avg_sq")
PER_WORKER_BYTES_CPU = 4 * 2**30  # what a CPU rank is assumed to have for a model copy


@dataclass(frozen=True)
class EngineOptions:
    """How the engine holds the model; none of it changes what is trained.

    offload: where the frozen shards lie between two uses; only with zero3. offload_dir: a directory for nvme, on each node.
    profile: further DeepSpeed settings, as `deepspeed_profile.read_profile` returns them.
    """

    sharding: Sharding
    offload: Offload = "none"
    offload_dir: str | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)

    def zero_optimization(self) -> dict[str, Any]:
        """DeepSpeed's section of that name: the profile's with these options over it."""
        section = dict(self.profile.get("zero_optimization", {}))
        offload_param = dict(section.pop("offload_param", {}))
        if self.sharding == "replicated":
            return {**section, "stage": 0}
        if self.offload != "none":
            offload_param["device"] = self.offload
            offload_param.setdefault("pin_memory", torch.cuda.is_available())
            if self.offload == "nvme":
                offload_param["nvme_path"] = self.offload_dir
            section["offload_param"] = offload_param
        return {**section, "stage": 3}


def choose_sharding(wanted: Literal["zero3", "replicated", "auto"], parameter_bytes: int, offload: Offload = "none") -> Sharding:
    """Resolve `auto`: shard when one copy takes over half of the device's memory, and when shards are to be offloaded."""
    if wanted != "auto":
        return wanted
    if offload != "none":
        return "zero3"
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else PER_WORKER_BYTES_CPU
    return "zero3" if parameter_bytes > SHARD_ABOVE_SHARE * memory else "replicated"


def agree_on_sharding(here: Sharding) -> Sharding:
    """What all ranks do, given what this one would: devices of different sizes may choose differently, and the smallest decides."""
    chosen: list[Sharding] = [here] * dist.get_world_size()
    dist.all_gather_object(chosen, here)
    return "zero3" if "zero3" in chosen else "replicated"


def require_offload(offload: Offload) -> None:
    """Raises ConfigError if this machine can't offload so: nvme needs DeepSpeed's async_io operator, compiled at first use."""
    if offload != "nvme":
        return
    _import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import is_ninja_available

    if not (is_ninja_available() and AsyncIOBuilder().is_compatible(verbose=False)):
        raise ConfigError(
            "training.offload=nvme needs DeepSpeed's async_io operator, which can't be built here: install the packages g++, "
            "ninja-build and libaio-dev (libaio-devel) on every node, or set training.offload to cpu"
        )


class ShardedTrainer:
    """A module whose `trained` parameters a DeepSpeed engine optimises with AdamW; the rest is frozen (and sharded).

    Needs an initialised torch.distributed process group. trained: name -> parameter, the same on all ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: dict[str, nn.Parameter],
        *,
        options: EngineOptions,
        learning_rate: float,
        weight_decay: float,
        gradient_clipping: float,
        batch_rows: int,
    ) -> None:
        deepspeed = _import_deepspeed()
        require_offload(options.offload)
        self.sharded = options.sharding == "zero3"
        self.trained = trained
        self._learning_rate, self._clipping = learning_rate, gradient_clipping
        config = {
            **options.profile,
            "train_micro_batch_size_per_gpu": batch_rows,
            "gradient_clipping": gradient_clipping if self.sharded else 0.0,
            "zero_optimization": options.zero_optimization(),
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": weight_decay, "torch_adam": True}},
            "steps_per_print": 2**31,
        }
        deepspeed.logger.setLevel("WARNING")
        self._zero = deepspeed.zero
        self.engine, self._optimizer, _, _ = deepspeed.initialize(model=module, model_parameters=list(trained.values()), config=config)
        self.device: torch.device = self.engine.device

    def step(self, forward: Callable[[nn.Module], Tensor], learning_rate_factor: float) -> Tensor:
        """One optimisation step: `forward(engine)` gives the scalar loss; gradients are averaged over the ranks. Returns the loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * learning_rate_factor
        loss = forward(self.engine)
        self.engine.backward(loss)
        if not self.sharded and self._clipping:  # the gradients are reduced by now; the engine would take each norm by itself
            nn.utils.clip_grad_norm_(self.trained.values(), self._clipping)
        self.engine.step()
        return loss.detach()

    def freeze(self) -> nn.Module:
        """End of training: nothing has gradients any more. Returns the module to call directly, in evaluation mode."""
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        return self.engine.module.eval()

    def gathered(self) -> dict[str, Tensor]:
        """Full copies (CPU, fp32) of the trained parameters. All ranks must call."""
        with self._zero.GatheredParameters(list(self.trained.values()), enabled=self.sharded):
            return {name: parameter.detach().float().cpu().clone() for name, parameter in self.trained.items()}

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Set the trained parameters, masters included. All ranks must call with equal values."""
        if self.sharded:
            self.engine.empty_partition_cache()  # a Jacobian's passes leave parameters gathered, which nobody may write to
        for name, parameter in self.trained.items():
            with self._zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.sharded):
                parameter.data.copy_(parameters[name])
            if self.sharded:
                self._set_shard(parameter, parameters[name], None)

    def moments(self) -> dict[str, Tensor]:
        """Adam moments of every trained parameter, gathered, as `{name}.exp_avg` and `{name}.exp_avg_sq`. All ranks must call."""
        gathered = {}
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                value = self._optimizer.get_full_hp_param(parameter, key) if self.sharded else self._optimizer.state[parameter][key]
                gathered[f"{name}.{key}"] = value.detach().float().cpu().reshape(_shape(parameter)).clone()
        return gathered

    def load_moments(self, moments: dict[str, Tensor], step: int) -> None:
        """Put gathered moments back, for any number of ranks, as after `step` steps."""
        flat = self._optimizer.fp32_partitioned_groups_flat if self.sharded else list(self.trained.values())
        states: dict[Any, Any] = self._optimizer.optimizer.state if self.sharded else self._optimizer.state
        for tensor in flat:  # Adam makes its state in the first step; a resumed job has made none yet
            states[tensor] = {"step": torch.tensor(float(step)), **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                if self.sharded:
                    self._set_shard(parameter, moments[f"{name}.{key}"], key)
                else:
                    states[parameter][key].copy_(moments[f"{name}.{key}"])

    @torch.no_grad()
    def _set_shard(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write this rank's part of a full value; DeepSpeed's own setter refuses sizes that the ranks don't divide."""
        shard, _ = self._optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        padded = torch.zeros(shard.numel() * dist.get_world_size())
        padded[: value.numel()] = value.flatten()
        shard.copy_(padded[shard.numel() * dist.get_rank() :][: shard.numel()])

    def parameter_bytes_held(self) -> int:
        """Bytes of model parameters in this rank's memory now: its shards, and what of the others' is gathered."""
        return sum(_held(parameter) for parameter in self.engine.module.parameters())

    def anyone(self, here: bool) -> bool:
        """Whether `here` holds on any rank that meets this one in a pass: on all ranks when sharded, else on this one alone."""
        if not self.sharded:
            return here
        flag = torch.tensor(int(here), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def lockstep(self, items: list[Item], idle: Item, *, collective: bool = False) -> Iterator[tuple[Item, bool, int]]:
        """(item, True, passes) for each of `items`; then (idle, False, passes) until every rank has made as many passes.

        Only needed where ranks meet in a pass: when the model is sharded, or `collective` (gradients are averaged).
        Otherwise each rank goes through its own items alone.
        """
        passes = len(items)
        if self.sharded or collective:
            most = torch.tensor(passes, device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            passes = int(most)
        for index in range(passes):
            yield (items[index], True, passes) if index < len(items) else (idle, False, passes)


def _import_deepspeed() -> Any:
    """DeepSpeed, imported late: it is slow to import and fixes its accelerator at that moment."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if on_cpu:
        # No compiled operators: its shared-memory all-reduce would be compiled at first use, which needs a compiler on every
        # node, writes to the home directory, and reaches no rank on another machine.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, sharded or not."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _held(parameter: nn.Parameter) -> int:
    shard = getattr(parameter, "ds_tensor", None)
    gathered = parameter.numel() * parameter.element_size()  # 0 while a sharded parameter isn't gathered
    return gathered if shard is None else gathered + shard.numel() * shard.element_size()
