"""Everything that launch uses of Ray and that is not Ray's public API.

    private.py            functions that call private parts of Ray
    kv.py                 the key-value store of a cluster
    lean_start.py         what is replaced in Ray while `ray.init` starts a Ray of our own
    train_controller.py   Ray Train's controller, with a policy of launch
    trainer.py            the trainer that starts it
    settings.py           environment variables, and the command line of Ray without its script

No other module of launch may import a private part of Ray (`tests/test_imports.py`); `clusters/azure` alone subclasses
Ray's node provider. Each entry says why it is needed, since which release of Ray it exists in this form, and what users
lose without it. Examined were 2.44, 2.49, 2.52, 2.55, 2.58, 2.59 and 2.60; launch supports the last three.
`tests/ray_seam/test_ray_seam.py` checks every entry against the installed Ray.

This package is a leaf: it imports nothing of launch but `errors`, and Ray only inside functions, except where a module
subclasses a class of Ray.
"""
