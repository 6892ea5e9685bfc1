"""`gptcli doctor`: devices, versions, what can be used, what is missing and how to get it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcli.cli.arguments import Debug, Json, Quiet

if TYPE_CHECKING:
    from gptcli.environment import Group

# extra: (what it is for, the packages that it brings)
_EXTRAS = {
    "eval": ("task metrics and lm-evaluation-harness", ("lm_eval", "sacrebleu", "rouge_score", "sklearn", "jiwer")),
    "multimodal": ("images and sound", ("PIL", "soundfile", "soxr")),
    "video": ("files of videos", ("av", "PIL")),
    "gpu": ("8-bit optimizers, fused kernels, qlora", ("bitsandbytes", "liger_kernel", "torchao")),
    "track": ("experiment trackers", ("tensorboard", "trackio", "wandb")),
    "serve": ("an OpenAI-compatible server", ("fastapi", "uvicorn", "openai")),
    "constrain": ("output held to a JSON schema or a regular expression", ("llguidance",)),
    "adapters": ("adapters: LoRA, DoRA", ("peft",)),
    "quantize": ("int8 and int4 weights", ("torchao",)),
    "rl": ("adapters and preference tuning", ("peft", "trl")),
    "ray": ("tokenizing on a Ray cluster", ("ray",)),
}


def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show devices, versions, what can be used here, and how to get what is missing."""
    del debug
    import importlib.util
    import os
    import shutil

    from gptcli.cli.console import console

    out = console(json=json, quiet=quiet)
    out.say("looking at this machine ...")

    from gptcli.device import (
        best_device,
        c_compiler,
        cpu_cores,
        device_name,
        has_fast_bf16,
        peak_flops,
        total_memory,
    )
    from gptcli.files import cache_root
    from gptcli.launch import group, local_processes
    from gptcli.runs.folder import runs_root
    from gptcli.train.record import versions

    device = best_device()
    launched, here = group(), local_processes("auto")
    free = shutil.disk_usage(next(p for p in (cache_root(), *cache_root().parents) if p.exists())).free
    peak = peak_flops(device, "fp32" if device.type == "cpu" else "bf16")
    machine = {
        "device": device_name(device),
        "kind": device.type,
        "cores": cpu_cores(),
        "memory_bytes": total_memory(device),
        "fast_bf16": has_fast_bf16(device),
        "peak_flops": peak,
        "c_compiler": c_compiler(device.type),
        "cache": str(cache_root()),
        "cache_free_bytes": free,
        "runs": str(runs_root()),
        "processes": here,
        "launcher": launched.launcher or None,
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
    }
    found = versions()
    missing = {
        extra: [name for name in packages if importlib.util.find_spec(name) is None]
        for extra, (_, packages) in _EXTRAS.items()
    }
    if json:
        out.print_json({"machine": machine, "versions": found, "missing": missing})
        return
    measured = "measured" if device.type == "cpu" else "data sheet"
    out.table(
        ["this machine", ""],
        [
            ["device", f"{machine['device']} ({device.type})"],
            ["cores, memory", f"{machine['cores']}, {total_memory(device) / 2**30:.1f} GiB"],
            ["matrix products", "unknown" if peak is None else f"{peak / 1e9:,.0f} GFLOP/s ({measured})"],
            ["fast bf16", "yes" if machine["fast_bf16"] else "no: train in fp32 here"],
            ["C compiler", str(machine["c_compiler"] or "none: train.compile has nothing to build with")],
            ["cache", f"{cache_root()} ({free / 2**30:.1f} GiB free)"],
            ["runs", str(runs_root())],
            ["processes", _started(launched, here)],
            ["offline", "yes (HF_HUB_OFFLINE=1)" if machine["offline"] else "no"],
        ],
    )
    out.table(["package", "version"], [[name, number] for name, number in found.items()])
    rows = []
    for extra, (purpose, _) in _EXTRAS.items():
        lacking = missing[extra]
        state = "ready" if not lacking else f"missing {', '.join(lacking)}"
        rows.append([extra, purpose, state, "" if not lacking else f"pip install 'gptcli[{extra}]'"])
    out.table(["extra", "for", "state", "get it"], rows)


def _started(launched: Group, here: int) -> str:
    """How many processes a training command runs on, and who started this one."""
    if launched.launcher and not launched.per_machine:
        return f"this is {launched.rank} of {launched.world_size}, started by {launched.launcher}"
    machines = f" on each of {launched.world_size} machines" if launched.world_size > 1 else ""
    by = f", under {launched.launcher}" if launched.launcher else ""
    return f"{launched.processes or here} with launch.processes: auto{machines}{by}"
