"""The compiled kernels of grating, without which everything works in torch. grating_core calls them."""

from pathlib import Path


def library() -> Path:
    """Return the path of the compiled module.

    Raises:
        FileNotFoundError: The module was not built.
    """
    for path in sorted(Path(__file__).parent.glob("grating_kernels.*")):
        if path.suffix in (".so", ".dylib", ".dll"):
            return path
    raise FileNotFoundError("grating_kernels has no compiled module: install it anew where there is a compiler")
