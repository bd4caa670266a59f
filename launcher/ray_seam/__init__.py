"""All uses of Ray by launch that are not Ray's public API.

    private.py            functions that call private parts of Ray
    kv.py                 the key-value store of a cluster
    lean_start.py         replacements in Ray while `ray.init` starts an embedded Ray
    train_controller.py   Ray Train's controller, with a policy of launch
    trainer.py            the trainer that starts it
    settings.py           environment variables, and the command line of Ray without its script

No other module of launch may import a private part of Ray (`tests/test_imports.py`); `clusters/azure` alone subclasses
Ray's node provider. Each entry states why it is needed, since which release of Ray it exists in this form, and what
users lose without it. The releases 2.44, 2.49, 2.52, 2.55, 2.58, 2.59 and 2.60 were checked; launch supports the last
three.
`tests/ray_seam/test_ray_seam.py` checks every entry against the installed Ray.

This package is a leaf: it imports nothing of launch but `errors`. `private`, `kv` and `settings` import Ray only inside
functions, since commands that need no Ray import them.
"""
