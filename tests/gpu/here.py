"""``python tests/gpu/here.py`` prints why the GPU targets of the Makefile cannot run here and exits 1, else the device's name."""

import sys


def why_not() -> str | None:
    """Say why there is no device, None when there is one."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


if __name__ == "__main__":
    why = why_not()
    if why is None:
        import torch

        print(torch.cuda.get_device_name())
    else:
        sys.exit(why)
