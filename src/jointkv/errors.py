"""Every error jointkv raises on purpose. All derive from `JointKVError`, so one `except` catches them."""


class JointKVError(Exception):
    """Base of all named errors."""


class InvalidPolicy(JointKVError, ValueError):
    """A `FusionPolicy` field, or a combination of fields, makes no sense. The message names the field."""


class LayoutError(JointKVError, ValueError):
    """A tensor has a shape, dtype or block size that this code was not written for."""


class PoolFull(JointKVError, RuntimeError):
    """The pool cannot give the pages asked for. `missing` says how many it lacks; nothing was changed."""

    def __init__(self, missing: int, requested: int, total: int) -> None:
        self.missing, self.requested, self.total = missing, requested, total
        super().__init__(
            f"the KV pool is full: {requested} pages requested, {missing} missing, {total} in all; "
            "raise max_pages, free a cache, or use a policy that fuses more"
        )


class IntegrityError(JointKVError, AssertionError):
    """An invariant of a stateful object does not hold. Always a bug in jointkv; please report it."""


class StalePlan(JointKVError, RuntimeError):
    """A `FusionPlan` was made for block tables that have changed since; nothing was applied."""


class ModelMismatch(JointKVError, ValueError):
    """A profile or a saved cache belongs to another model."""


class UnsupportedModel(JointKVError, ValueError):
    """The model has no KV cache of a kind that can be fused. The message names the reason."""


class UnsupportedUse(JointKVError, TypeError, AttributeError):
    """Something that others can do, or that is done with a cache of transformers, and this cannot. Says what to do."""


class GradientLost(JointKVError, RuntimeError):
    """A loss depends on gradients of an earlier forward pass, which pages do not keep. Says what to do instead."""


class UnsupportedTransformers(JointKVError, ImportError):
    """The installed transformers lacks what jointkv uses, of which the message names all, or was never run with it."""


class BadInput(JointKVError, ValueError):
    """A file or a command-line argument cannot be used. The message says where and why."""


class UnsupportedEngine(JointKVError, RuntimeError):
    """The serving engine is set up in a way the plugin was not written or never run for. Says what to do instead."""


class NativeUnavailable(JointKVError, RuntimeError):
    """A kernel could not be compiled or loaded on this machine. The message says why."""


class StoreError(JointKVError, RuntimeError):
    """A store of pages cannot be read or written, such as on a full disk. Says why; what was flushed is still there."""
