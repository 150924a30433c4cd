"""What pip has to install for the parts that not everybody needs; pyproject.toml has the same in its extras."""

SIMULATOR = ("cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14")
MATPLOTLIB = "matplotlib>=3.8"


def install(*requirements: str) -> str:
    """Return a command that installs packages.

    It names the packages themselves: it works wherever this one was installed from.
    """
    return " ".join(["pip install", *(f'"{r}"' if set(r) & set("<>[") else r for r in requirements)])
