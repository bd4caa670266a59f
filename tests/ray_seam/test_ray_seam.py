"""The installed Ray has all private parts that launch uses, with the expected signatures."""

from __future__ import annotations

import functools
import importlib
import inspect
import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray

from launcher.clusters.local.embedded_ray import EmbeddedRay
from launcher.errors import RayVersionError
from launcher.ray_seam import kv, lean_start, private, settings, train_controller, trainer
from launcher.runners import controller_policy
from tests.support.waiting import wait_for

pytestmark = pytest.mark.smoke
RAY = Path(ray.__file__).parent
# How launch calls functions of Ray: path, positional arguments, names of keyword arguments.
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ray._private.accelerators:get_accelerator_manager_for_resource": (1, ()),
    "ray._private.node:Node.dead_processes": (1, ()),
    "ray._private.node:Node.start_api_server": (1, ("include_dashboard", "raise_on_failure")),
    "ray._private.parameter:RayParams.__init__": (1, ()),
    "ray._private.services:ConsolePopen.__init__": (2, ("stdin", "process_group")),
    "ray._private.state:GlobalState.available_resources_per_node": (1, ()),
    "ray._private.state:GlobalState.get_draining_nodes": (1, ()),
    "ray._private.utils:get_dashboard_dependency_error": (0, ()),
    "ray._private.worker:init": (0, ("address", "job_config", "_node_ip_address", "_temp_dir")),
    "ray.autoscaler.v2.sdk:get_cluster_status": (1, ()),
    "ray.autoscaler.v2.sdk:request_cluster_resources": (2, ()),
    "ray.experimental.internal_kv:internal_kv_get_gcs_client": (0, ()),
    "ray.job_config:JobConfig.__init__": (1, ()),
    "ray.util:remove_placement_group": (1, ()),
    "ray.util.placement_group:PlacementGroup.__init__": (2, ()),
    "ray.cloudpickle:register_pickle_by_value": (1, ()),
}
# Names that have no signature to inspect: classes and methods in native code, and plain values.
NAMES = (
    "ray:PlacementGroupID.from_hex",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
    "ray._private.worker:_global_node",
    "ray._private.worker:listen_error_messages",
    "ray._raylet:AuthenticationTokenLoader.instance",
    "ray._raylet:AuthenticationTokenLoader.reset_cache",
    "ray._raylet:Config.initialize",
    "ray._raylet:GcsClient",
    *(
        f"ray._raylet:InnerGcsClient.{method}"
        for method in (
            *("internal_kv_get", "internal_kv_put", "internal_kv_del", "internal_kv_keys"),
            *("get_all_node_info", "get_all_job_info", "drain_node"),
        )
    ),
)
# The parts of the package that need no entry: tools, data, and parts that the docstring of their module describes.
TOOLS = {"Policy", "replaced", "attribute", "NodeInfo", "adapted", "put", "get", "keys", "delete", "delete_all"}


def found(path: str) -> Any:
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


@pytest.mark.parametrize("path", NAMES)
def test_the_name_exists(path: str) -> None:
    found(path)


@pytest.mark.parametrize("path", CALLS)
def test_the_function_accepts_the_arguments_of_launch(path: str) -> None:
    positional, keywords = CALLS[path]
    inspect.signature(found(path)).bind(*range(positional), **dict.fromkeys(keywords))


# The methods that each subclass of a class of Ray overrides, besides constructors.
OVERRIDES: dict[type, set[str]] = {
    train_controller.Avoidance: {"on_controller_start_worker_group"},
    train_controller.Group: {"_start"},
    train_controller.Introduction: {"after_worker_group_start"},
    train_controller.Retries: {"make_decision"},
    train_controller.Sizes: {
        "_get_num_workers_for_resource_request",
        "_maybe_send_resource_request",
        "after_controller_start",
        "make_decision_for_non_running_worker_group",
        "make_decision_for_running_worker_group",
    },
    train_controller.TrainController: {
        "_make_and_handle_scaling_decision_for_non_running_worker_group",
        "_poll_workers",
        "_start_worker_group",
        "_step",
        "worker_group_cls",
    },
    trainer.RayTrainer: {"_create_default_callbacks", "_initialize_and_run_controller"},
}
# The names of Ray Train that the subclasses and the policy use without overriding them.
USED = {
    "ray.train.v2._internal.execution.worker_group:WorkerGroup": (
        *("_start", "execute_async", "get_worker_group_state", "get_workers", "has_started", "shutdown", "create"),
    ),
    "ray.train.v2._internal.execution.controller:TrainController": (
        *("_shutdown_worker_group", "abort", "get_result", "run"),
    ),
    "ray.train.v2._internal.execution.worker_group.poll:WorkerGroupPollStatus": ("errors", "finished"),
}
# Attributes that Ray sets at run time, by the class that defines them.
ATTRIBUTES = {
    "ray.train.v2._internal.execution.worker_group:WorkerGroup": ("_world_rank_to_ongoing_poll", "start_time"),
    "ray.train.v2._internal.execution.worker_group:WorkerGroupState": ("placement_group_handle",),
    "ray.train.v2._internal.execution.worker_group.worker:ActorMetadata": ("node_id",),
    "ray.train.v2._internal.execution.worker_group.worker:Worker": ("actor", "metadata"),
    "ray.train.v2._internal.execution.worker_group.poll:WorkerGroupPollStatus": ("worker_statuses",),
    "ray.train.v2._internal.execution.worker_group.poll:WorkerStatus": ("error",),
    "ray.train.v2._internal.execution.controller:TrainController": ("_worker_group", "worker_group_cls"),
    "ray.train.v2._internal.execution.scaling_policy:ResizeDecision": ("num_workers", "resources_per_worker"),
    "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError": ("health_check_failure",),
    "ray.train.v2._internal.exceptions:WorkerGroupStartupTimeoutError": ("num_workers",),
    "ray.train.v2.api.exceptions:ControllerError.__init__": ("controller_failure",),
    "ray.train.v2.api.exceptions:WorkerGroupError.__init__": ("worker_failures",),
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer": (
        *("_create_default_callbacks", "_initialize_and_run_controller", "train_fn_ref", "scaling_policy"),
        *("failure_policy", "train_run_context"),
    ),
}


@pytest.mark.parametrize("own", OVERRIDES, ids=lambda own: own.__name__)
def test_an_overridden_method_exists_and_is_called_as_ours_is(own: type) -> None:
    (base,) = own.__bases__
    for name in OVERRIDES[own]:
        ours, theirs = vars(own)[name], getattr(base, name)
        if inspect.isfunction(ours):
            assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs), name
            parameters = inspect.signature(theirs).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(ours).parameters.values()):
                # Ray adds the parameter in a process that has made an actor of the class, as other tests do.
                own_names = [each for each in inspect.signature(ours).parameters if each != "_ray_trace_ctx"]
                assert own_names == [each for each in parameters if each != "_ray_trace_ctx"], name


@pytest.mark.parametrize("own", OVERRIDES, ids=lambda own: own.__name__)
def test_every_override_is_listed(own: type) -> None:
    (base,) = own.__bases__
    dunder = {name for name in vars(own) if name.startswith("__")} | {"_abc_impl"}
    inherited = {name for name in vars(own) if hasattr(base, name)}
    private_names = {name for name in vars(own) if name.startswith("_")}
    assert (inherited | private_names) - dunder == OVERRIDES[own]


@pytest.mark.parametrize("path", USED)
def test_the_class_has_the_methods(path: str) -> None:
    assert [name for name in USED[path] if not hasattr(found(path), name)] == []


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_the_class_has_the_attributes(path: str) -> None:
    source = inspect.getsource(found(path))
    assert [name for name in ATTRIBUTES[path] if name not in source] == []


def test_the_policy_implements_the_protocol() -> None:
    policy = controller_policy.RunPolicy(controller_policy.Rules("run", workers=2, min_workers=1, share={"CPU": 1.0}))
    asked = {name for name in vars(train_controller.Policy) if not name.startswith("_")}
    asked |= train_controller.Policy.__annotations__.keys()
    assert [name for name in asked if not hasattr(policy, name)] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ray._raylet:RAY_NODE_ID_KEY", private.NODE_ID_LABEL),
        ("ray.core.generated.autoscaler_pb2:DRAIN_NODE_REASON_IDLE_TERMINATION", private.IDLE_TERMINATION),
        ("ray.core.generated.autoscaler_pb2:DRAIN_NODE_REASON_PREEMPTION", private.PREEMPTION),
        ("ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE", private._ALIVE),
    ],
)
def test_a_constant_has_the_value_that_ray_gives_it(path: str, expected: object) -> None:
    assert found(path) == expected


def test_replaced_attributes_are_read_where_ray_starts() -> None:
    """The replacements have an effect only while Ray looks these names up in the module that launch changes."""
    parameters = found("ray._private.parameter:RayParams")()
    assert {"no_monitor", "include_log_monitor"} <= vars(parameters).keys()
    assert "_py_driver_sys_path" in vars(found("ray.job_config:JobConfig")())
    sources = {
        name: inspect.getsource(importlib.import_module(f"ray._private.{name}"))
        for name in ("services", "node", "worker")
    }
    assert "= ConsolePopen(" in sources["services"]
    assert "ray_constants.ENABLE_RAY_CLUSTER" in sources["services"]
    assert "parameter.RayParams(" in sources["worker"]
    assert "target=listen_error_messages" in sources["worker"]
    assert "_py_driver_sys_path.extend(" in sources["worker"]
    assert "atexit.register(shutdown" in sources["worker"]
    assert "self._webui_url" in sources["node"]
    assert "get_dashboard_dependency_error()" in sources["node"] + sources["services"] + sources["worker"]


def variables() -> set[str]:
    named = {settings.HEALTH_CHECK_TIMEOUT, settings.START_TIMEOUT}
    return named | settings.RAY_ENVIRONMENT.keys() | settings.RAY_TRAIN_ENVIRONMENT.keys() | settings.NO_METRICS.keys()


def test_ray_reads_the_variables() -> None:
    sources = "\n".join(path.read_text(errors="replace") for path in RAY.rglob("*.py"))
    with (RAY / "_raylet.so").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as native:
        # Native code knows a variable without its prefix.
        unknown = {
            name for name in variables() if name not in sources and native.find(name.removeprefix("RAY_").encode()) < 0
        }
    assert unknown == set()


def test_the_command_of_ray_has_the_options() -> None:
    commands = found(f"{settings.COMMAND[1]}:cli").commands
    start, up = ({option for each in commands[name].params for option in each.opts} for name in ("start", "up"))
    wanted = {"--head", "--address", "--port", "--node-ip-address", "--object-manager-port", "--autoscaling-config"}
    wanted |= {"--dashboard-host", "--dashboard-port", "--include-dashboard"}
    assert wanted | {"--no-monitor", "--temp-dir", "--disable-usage-stats", "--block"} <= start
    assert {"--yes", "--no-config-cache"} <= up
    assert "stop" in commands


# ---- replacing ------------------------------------------------------------------------------------------------------


def test_a_replacement_ends_with_its_block() -> None:
    owner = SimpleNamespace(name="before")
    replacement = private.replaced(owner, "name", "within")
    with replacement:
        assert owner.name == "within"
    assert owner.name == "before"


def test_a_missing_name_is_an_error_of_the_version() -> None:
    owner = ModuleType("ray._private.services")
    with pytest.raises(RayVersionError) as caught, private.replaced(owner, "ConsolePopen", object):
        pass
    assert caught.value.exit_status == 2
    assert "ray._private.services.ConsolePopen" in str(caught.value)
    assert ray.__version__ in str(caught.value)
    assert not hasattr(owner, "ConsolePopen")


def test_a_ray_without_a_required_part_is_rejected_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.delattr(services, "ConsolePopen")
    with pytest.raises(RayVersionError), lean_start.adapted(lean=True):
        pytest.fail("Ray would start without the adaptation")


# ---- a Ray that runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedRay]:
    with EmbeddedRay(cpus=2, gpus=0) as started:
        yield started


def test_the_store_holds_texts_for_both_ways_to_it(cluster: EmbeddedRay) -> None:
    client = private.own_gcs_client()
    kv.put("seam/a", "first")
    kv.put("seam/a", "ä")
    kv.put("seam/b", "2", client, 5.0)
    assert kv.get("seam/a", client, 5.0) == "ä"
    assert kv.get("seam/b") == "2"
    assert kv.get("seam/none") is None
    assert kv.keys("seam/") == kv.keys("seam/", client, 5.0) == ["seam/a", "seam/b"]
    kv.delete("seam/a")
    kv.delete("seam/a", client, 5.0)
    kv.put("another", "stays")
    assert kv.keys("seam/") == ["seam/b"]
    kv.delete_all("seam/")
    assert kv.keys("") == ["another"]


def test_a_package_is_taken_once(cluster: EmbeddedRay) -> None:
    client = private.own_gcs_client()
    client.internal_kv_put(b"gcs://order", b"\xff", True, None)
    assert kv.take_package("order", client) == b"\xff"
    assert kv.take_package("order", client) is None


def test_the_nodes_are_as_ray_describes_them(cluster: EmbeddedRay) -> None:
    client = private.own_gcs_client()
    own = ray.get_runtime_context().get_node_id()
    (node,) = private.living_nodes(client, 5.0)
    assert (node.id, node.address, node.resources["CPU"]) == (own, "127.0.0.1", 2.0)
    assert node.port == ray.nodes()[0]["NodeManagerPort"]
    assert private.free_resources()[own]["CPU"] == 2.0
    assert private.leaving_nodes() == set()
    assert private.draining_nodes(client, 5.0) == {}
    assert private.has_jobs(client, 5.0)
    assert private.dead_process() is None


def test_a_placement_group_is_released_by_its_id(cluster: EmbeddedRay) -> None:
    group = ray.util.placement_group([{"CPU": 1}])
    private.free_placement_group(group.id.hex())
    assert ray.util.placement_group_table(group)["state"] == "REMOVED"


def test_a_node_at_work_is_drained(cluster: EmbeddedRay) -> None:
    """The last test of this Ray: a drain cannot be undone, and an idle node would end at once."""

    @ray.remote(num_cpus=1)
    class Busy:
        def begin(self) -> None: ...

    busy = Busy.remote()  # type: ignore[attr-defined]
    ray.get(busy.begin.remote())
    client = private.own_gcs_client()
    own = ray.get_runtime_context().get_node_id()
    assert private.drain(client, own, private.IDLE_TERMINATION, "a test", 0, 5.0), "Ray drains a node that is at work"
    deadline = float(int(time.time()) + 600)
    assert private.drain(client, own, private.PREEMPTION, "a test", deadline, 5.0) is None
    wait_for(lambda: private.draining_nodes(client, 5.0) == {own: deadline})
    assert private.leaving_nodes() == {own}


# ---- the package itself ---------------------------------------------------------------------------------------------


def entries() -> list[Callable[..., Any]]:
    modules = (private, kv, lean_start, train_controller, trainer)
    return [
        entry
        for module in modules
        for name, entry in vars(module).items()
        if callable(entry) and getattr(entry, "__module__", "") == module.__name__ and not name.startswith("_")
        if name not in TOOLS
    ]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.__name__)
def test_an_entry_has_reason_first_release_and_consequence(entry: Callable[..., Any]) -> None:
    for word in ("why", "since", "without"):
        assert f"{word}" in (entry.__doc__ or "").lower(), f"the docstring of {entry.__name__} has no {word.title()}:"


def test_the_controller_travels_without_launch() -> None:
    """Ray Train's controller may run where launch is not installed: it is pickled with all that it needs of launch."""
    program = """
import sys
from ray import cloudpickle
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "launcher":
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Absent())
policy, controller, inline = cloudpickle.loads(sys.stdin.buffer.read())
assert inline.get() == [1]
assert controller.worker_group_cls.kill
assert policy.worker_environment() == {"LAUNCH_ATTEMPT": '{"attempt": 0, "cause": ""}'}
for ask in (policy.new_size, policy.avoided_nodes, policy.group_begins):
    try:
        ask()
    except Exception as error:  # as far as Ray, to which this process is not connected
        assert not isinstance(error, ImportError), error
"""
    controller_policy.send_with_policy()
    policy = controller_policy.RunPolicy(controller_policy.Rules("run", workers=2, min_workers=1, share={"CPU": 1.0}))
    inline = train_controller.Inline([1])
    content = ray.cloudpickle.dumps((policy, train_controller.TrainController, inline))
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, input=content, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
