"""clip_scratch: train, measure and search with a CLIP-style dual encoder. The public names, nothing else."""

import signal
import sys
import types

import lazy_loader

# `python -m clip_scratch.NAME`, now being imported: until errors.run_command takes over, Ctrl-C ends it without a word
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith("clip_scratch.") for word in sys.orig_argv)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Names are looked up when they are first used, so that `import clip_scratch` loads no heavy library
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Package(types.ModuleType):
    """Keeps `classify` and `compare` the public functions: importing the verbs of these names would replace them."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
