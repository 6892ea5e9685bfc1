"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) divided over the processes of a run.

Rajbhandari et al. 2020, arXiv:1910.02054. DeepSpeed's engine is the Trainer's wrapped model, around our optimizer.
accelerate's plugin for it is not used: it updates at the end of the backward pass (1.15), before loss and norm can be
judged. A checkpoint is that of every strategy, so that any goes on from it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptcli.errors import RecipeError, first_line
from gptcli.launch import is_main_process, rank, world_size
from gptcli.model.saved import fit, saved_state
from gptcli.reporting import quiet
from gptcli.train import optim
from gptcli.train.base import restoring
from gptcli.train.gradients import clip_parts, norm_of
from gptcli.train.lean import LeanTrainer
from gptcli.train.sharding import refuse_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.schema import Train


class Zero:
    """An optimizer whose state, and more, DeepSpeed has divided; for the Trainer an optimizer like others.

    Args:
        model: the whole model, the same on every process. At stage 3 a part of it is left.
        train: the recipe's section; its optimizer is one whose update works on each value by itself.
        settings: of DeepSpeed, see `zero_settings`.

    Attributes:
        engine: DeepSpeed's, which is called in place of the model.
        inner: our optimizer, of the parts; a schedule is made for it.

    Raises:
        RecipeError: DeepSpeed refuses the settings, or left weights whole that stage 3 is to divide.
    """

    def __init__(self, model: PreTrainedModel, train: Train, settings: dict[str, Any]) -> None:
        optimizer = optim.build_optimizer(model, train)
        assert optimizer is not None
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._names = [group for group in self._names if group]  # DeepSpeed leaves empty ones out
        self._model, self.inner = model, optimizer
        self._whole = settings["zero_optimization"]["stage"] < 3
        self._half = bool(settings["bf16"]["enabled"])
        self.engine = _engine(model, optimizer, settings)
        # Which micro-batch is a step's last is told at each backward pass.
        self.engine.no_sync = contextlib.nullcontext
        if not self._whole:
            check_divided(model, world_size())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer, of which learning rates are read and set."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    # ---- a step ----

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """The backward pass of a micro-batch, the last one of a step or not; gradients are averaged over processes."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self) -> torch.Tensor:
        """The norm of the whole gradient, after the last backward pass of a step."""
        parts = self._gradient()
        return norm_of(parts, [1] * len(parts))

    def clip(self, norm: torch.Tensor, most: float) -> None:
        """See `train.gradients.clip`."""
        clip_parts(self._gradient(), norm, most)

    def drop(self) -> None:
        """Have the next step change nothing: DeepSpeed leaves out one whose gradient is not finite."""
        for part in self._gradient():
            part.fill_(math.nan)

    def step(self) -> None:
        """Update weights and state, and forget the gradient."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: `step` has forgotten the gradient."""

    def _gradient(self) -> list[torch.Tensor]:
        """What this process has of the gradient: no value is on two of them, and zeros fill it up."""
        return [part for parts in self.engine.optimizer.averaged_gradients.values() for part in parts or ()]

    # ---- weights and state, whole, by the names of the parameters ----

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The fp32 weights on the host, on rank 0, which all processes bring together; None: the model has them."""
        if self._whole and not self._half:
            return None
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter)
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().float().clone()
            if is_main_process():
                found[name] = value.cpu()
        buffers = dict(self._model.named_buffers())
        kept = {name: value.cpu() for name, value in self._model.state_dict().items() if name in buffers}
        return {**found, **kept} if is_main_process() else {}

    def load_weights(self, folder: Path) -> Any:
        """Fill the model from a folder with safetensors; what `load_state_dict` returns."""
        import deepspeed

        saved = saved_state(self._model, folder)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        places: dict[str, torch.Tensor] = {**parameters, **dict(self._model.named_buffers())}
        with torch.no_grad():
            for name in sorted(saved.keys() & places.keys()):  # all processes in the same order
                place, value = places[name], saved[name].to(places[name].device)
                with deepspeed.zero.GatheredParameters([place], modifier_rank=0):
                    place.copy_(value)
                if name in parameters and place.requires_grad:
                    _set(parameters[name], value)
        return fit(self._model, saved)

    @property
    def parameter_names(self) -> list[str]:
        """The parameters as `state_dict` numbers them."""
        return [name for names in self._names for name in names]

    def state_dict(self) -> dict[str, Any]:
        """The state as if nothing were divided: that of torch's optimizers. Rank 0 has it, on the host."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        parameters = dict(self._model.named_parameters())
        state: dict[int, dict[str, Any]] = {}
        groups, first = [], 0
        for group, names, flats in zip(self.inner.param_groups, self._names, self._flats(), strict=True):
            groups.append({**group, "params": list(range(first, first + len(names)))})
            for number, name in enumerate(names, first):
                of_one = {}
                for key, value in self.inner.state.get(flats[0], {}).items():
                    # Each its own number of steps: one tensor for all would be counted up once for each of them.
                    whole = safe_get_full_optimizer_state(parameters[name], key) if value.ndim else value.clone()
                    if is_main_process():
                        of_one[key] = whole.cpu()
                if of_one:
                    state[number] = of_one
            first += len(names)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, of these processes or of others."""
        parameters, names, state = dict(self._model.named_parameters()), self.parameter_names, state_dict["state"]
        for group, saved, flats in zip(self.inner.param_groups, state_dict["param_groups"], self._flats(), strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            like: dict[str, Any] = next((state[number] for number in saved["params"] if number in state), {})
            for flat in flats:
                self.inner.state[flat] = {
                    key: torch.zeros_like(flat, requires_grad=False) if value.ndim else value.to(flat.device)
                    for key, value in like.items()
                }
        self._link()
        for number, values in sorted(state.items()):
            for key, value in values.items():
                if value.ndim:
                    _set(parameters[names[number]], value, key)

    def _flats(self) -> list[list[torch.Tensor]]:
        """For each group of parameters the flat tensors of this process that the inner optimizer updates."""
        optimizer = self.engine.optimizer
        if self._whole:
            return [[flat] for flat in optimizer.single_partition_of_fp32_groups]
        found: list[list[torch.Tensor]] = [[] for _ in self._names]
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            found[optimizer.sub_group_to_group_id[number]].append(flat)
        return found

    def _link(self) -> None:
        """Tell each parameter its place in the state: DeepSpeed 0.19 does so after the first group's first step."""
        if not self._whole:
            return
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        optimizer = self.engine.optimizer
        for parameters, flats in zip(optimizer.bit16_groups, self._flats(), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flats[0], self.inner.state)


def _set(parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
    """Put a whole tensor in the place of a parameter's fp32 weights, or of its state `key`, as far as they are here."""
    from deepspeed import utils

    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_tensor"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # The ones for whole tensors do not know of what fills the last part up (0.19).
    size = parameter.ds_tensor.numel()
    own = value.flatten()[size * rank() : size * (rank() + 1)]
    part = torch.nn.functional.pad(own, (0, size - len(own)))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, key)


def _engine(model: PreTrainedModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine, without a word on the screen."""
    # What it calls of torch has new names since 2.13, which torch says at each call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()), quiet():
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # A kernel for inference, which it would compile at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            if settings["zero_optimization"]["stage"] == 3:
                if settings["bf16"]["enabled"]:
                    for parameter in model.parameters():
                        parameter.data = parameter.data.bfloat16()
                # One by one: the engine would have the whole model on the device first.
                deepspeed.init_distributed(dist_init_required=False)
                deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
        except (ValueError, AssertionError, TypeError, deepspeed.DeepSpeedConfigError) as error:
            raise RecipeError(
                f"launch.deepspeed: DeepSpeed refuses the configuration: {first_line(error)[:300]}",
                remedy="Its keys: https://www.deepspeed.ai/docs/config-json",
            ) from error


def say_fp32(folder: Path) -> None:
    """Let a saved configuration name the type of the weights beside it, where transformers names that in training."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") != "float32":
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_divided(model: torch.nn.Module, processes: int) -> None:
    """Refuse a model of which not every parameter is divided over so many processes."""
    parameters = list(model.parameters())
    held = sum(parameter.ds_tensor.numel() for parameter in parameters if hasattr(parameter, "ds_tensor"))
    whole = sum(not hasattr(parameter, "ds_tensor") for parameter in parameters)
    every = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    most = every / processes + len(parameters)
    refuse_whole(model, "deepspeed", whole=whole, held=held, every=every, most=most)


class ZeroTrainer(LeanTrainer):
    """A Trainer whose model and optimizer may be divided by DeepSpeed."""

    _zero: Zero | None = None

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._zero is None:
            return super()._wrap_model(model, *args, **kwargs)
        zero = self._zero
        self.accelerator.backward = lambda loss: zero.backward(loss, last=self.accelerator.sync_gradients)
        return zero.engine

    def _norm(self, model: Any) -> torch.Tensor:
        return super()._norm(model) if self._zero is None else self._zero.norm()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._zero is None:
            return super()._clip_grad_norm(model)
        norm = self._zero.norm()
        self._zero.clip(norm, self.args.max_grad_norm)
        return norm

    def drop_gradient(self, model: Any) -> None:
        """As the Trainer's, of gradients that may be divided."""
        if self._zero is None:
            super().drop_gradient(model)
        else:
            self._zero.drop()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._zero is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with restoring("the weights", resume_from_checkpoint):
            self._issue_warnings_after_load(self._zero.load_weights(Path(resume_from_checkpoint)))
