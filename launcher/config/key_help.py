"""What each configuration key means, in one sentence: the text of `launch help KEY`."""

from __future__ import annotations

import json
from typing import Any

from launcher.config.cluster_kinds import all_kinds
from launcher.config.keys import explain_unknown, is_known, leaves, type_name
from launcher.config.schema import job_schema
from launcher.errors import ConfigError

_EVERY = "in steps (50), epochs (1ep) or time (10min)"
MEANING: dict[str, str] = {
    "run.name": "Name of the run and of its directory; null: experiment and time.",
    "run.root": "Where runs are written: a directory, an object store (abfss://…), or head:///PATH of a cluster.",
    "run.resume": "true: continue run.name from its newest checkpoint; auto: continue it if it exists, else start it.",
    "run.like": "Name of a run whose configuration a new run starts from.",
    "trainer.epochs": "Length of the run in passes over the training data.",
    "trainer.steps": "Length of the run in optimizer steps; takes precedence over trainer.epochs.",
    "trainer.global_batch_size": "Samples in one optimizer step, over all workers.",
    "trainer.microbatch_size": "Maximum number of samples that a worker puts through the network at once, the rest "
    "after them (gradient accumulation); null: its whole share.",
    "trainer.precision": "Precision in which the network computes: float32, bfloat16 or float16 (with loss scaling).",
    "trainer.deterministic": "true: bit-identical losses and weights for any number of workers (ddp, float32).",
    "trainer.compile": "true: compile the training step with torch.compile.",
    "trainer.compile_blocks": "true: compile each repeated block of the network by itself, which starts sooner.",
    "trainer.clip_norm": "Largest global norm of the gradient; null: no clipping.",
    "trainer.seed": "The one seed of a run: weights, order of samples and random numbers follow from it.",
    "trainer.shuffle": "false: read the training data in its own order, in every epoch.",
    "trainer.drop_last": "true: leave out the last batch of an epoch where it is smaller than the global batch.",
    "trainer.sync_batchnorm": "true: compute the statistics of batch normalization over all workers.",
    "trainer.overfit_batches": "Train on this many batches only, to see that the network can fit them; 0: on all.",
    "trainer.log_every": f"Interval between two entries of metrics and TensorBoard, {_EVERY}.",
    "trainer.evaluate_every": f"Interval between two evaluations, {_EVERY}.",
    "scaling.workers": "Number of worker processes over all machines; auto: one per GPU, two on CPUs.",
    "scaling.device": "Device of a worker: auto, cpu or cuda.",
    "scaling.cpus_per_worker": "CPUs that one worker reserves; fractions are allowed.",
    "scaling.gpus_per_worker": "GPUs that one worker reserves; null: 1 on GPUs, 0 on CPUs. Fractions are allowed.",
    "scaling.min_workers": "Minimum number of workers with which a run starts or continues; null: scaling.workers.",
    "scaling.timeout": "Seconds after which a worker that hangs is replaced.",
    "checkpoint.every": f"Interval between two checkpoints, {_EVERY}.",
    "checkpoint.keep": "Number of newest checkpoints that are kept besides the best one.",
    "checkpoint.max_failures": "Consecutive restarts after a lost worker, without a newer checkpoint in between.",
    "checkpoint.monitor": "Tag that defines the best checkpoint, such as val/loss; null: none is the best.",
    "checkpoint.mode": "Whether the monitored tag is better when it is smaller (min) or larger (max).",
    "checkpoint.load": "Initial weights: a run's name (its best checkpoint), a .safetensors file or a state dict.",
    "checkpoint.load_strict": "false: names that only the file or only the model has are allowed.",
    "logging.tensorboard": "false: write no TensorBoard file.",
    "logging.graph": "false: do not draw the network for TensorBoard.",
    "logging.hparams": "Keys shown in TensorBoard's HParams tab; a sweep sets them itself.",
    "logging.sinks": "Further destinations of the numbers, by name: those of packages that trust names.",
    "logging.profile": "[first, last] step of a trace on every rank, for Perfetto and TensorBoard.",
    "strategy.name": "How gradients become an update: ddp, fsdp, local_sgd, diloco or auto.",
    "strategy.compression": "Compression of gradients on the network: none, bf16, fp16 or powersgd.",
    "strategy.activation_checkpointing": "true: compute activations of the blocks again instead of keeping them.",
    "strategy.blocks": "Class names of the blocks that FSDP divides; []: found by their repetition.",
    "strategy.static_graph": "true: promise DDP that every step uses the same parameters.",
    "strategy.bucket_mb": "Size of DDP's gradient buckets in MB.",
    "strategy.powersgd_rank": "Rank of PowerSGD's approximation of a gradient.",
    "strategy.powersgd_after": "Steps with uncompressed gradients before PowerSGD begins.",
    "strategy.cpu_offload": "true: FSDP keeps parameters and optimizer state in host memory.",
    "strategy.hybrid": "true: FSDP divides within a machine and replicates between machines.",
    "strategy.inner_steps": "Local optimizer steps between two synchronizations.",
    "strategy.overlap_steps": "Local steps during which a synchronization travels; 0: the workers wait for it.",
    "strategy.outer_lr": "Learning rate of DiLoCo's outer optimizer.",
    "strategy.outer_momentum": "Nesterov momentum of DiLoCo's outer optimizer.",
    "cluster.kind": "Where a run is executed; choose it with cluster=KIND.",
    "cluster.keep_minutes": "Minutes that the embedded Ray of this machine stays for the next command; 0: it ends.",
    "cluster.address": "HOST:PORT of an existing Ray cluster, or http://HOST:8265 for Ray Jobs; null: RAY_ADDRESS.",
    "cluster.name": "Name of a cluster that launch creates; null: its kind.",
    "cluster.hosts": "SSH hosts, [USER@]HOST[:PORT] each; the first is the head.",
    "cluster.user": "User on hosts that are written without one.",
    "cluster.ssh_key": "File of the private SSH key; null: what ssh uses.",
    "cluster.ssh_config": "Configuration file of ssh in place of ~/.ssh/config.",
    "cluster.python": "Python interpreter of an environment that the hosts have already; null: one is created.",
    "cluster.size": "Azure size of the GPU VMs, one of `launch sizes`.",
    "cluster.nodes": "Number of GPU VMs; the head is a small VM beside them.",
    "cluster.head_size": "Azure size of the head.",
    "cluster.region": "Azure region.",
    "cluster.zone": "Availability zone of all VMs; null: the first that offers the size.",
    "cluster.spot": "true: spot VMs; prefer: spot VMs, on-demand VMs where there are none; false: on-demand VMs.",
    "cluster.min_nodes": "GPU VMs that `launch up` waits for; null: all.",
    "cluster.alternatives": "Other {size, region, zone, …}, tried in order where Azure has no capacity.",
    "cluster.idle_minutes": "Minutes without work after which a GPU VM is deleted.",
    "cluster.down_after": "true: delete the whole cluster, head included, after idle_minutes without work.",
    "cluster.launch_attempts": "Failed attempts to create GPU VMs after which no further one is made.",
    "cluster.subscription": "Azure subscription; null: that of `az account show`.",
    "cluster.ssh_from": "Network (CIDR) that may reach the head by SSH, or anywhere; null: this machine's address.",
    "cluster.node_usd_per_hour": "Price of a machine with workers in USD per hour; null: by size, region and spot.",
    "cluster.head_usd_per_hour": "Price of the head in USD per hour; needs cluster.node_usd_per_hour.",
    "cluster.budget_usd": "Cost over the whole life of a run at which it saves a checkpoint and stops.",
    "cluster.mounts": "Path on every node -> abfss://… (read-only) or claim://NAME (AKS).",
    "cluster.image": "Container image of head and workers (AKS).",
    "cluster.context": "Context of kubectl; null: the current one.",
    "cluster.namespace": "Kubernetes namespace.",
    "cluster.secret": "Kubernetes secret that holds the values of cluster.env.",
    "cluster.service_account": "Kubernetes service account with a workload identity that may reach the storage.",
    "cluster.pull_secrets": "Kubernetes secrets with which the pods pull cluster.image from a private registry.",
    "cluster.tolerations": "Taints that all pods tolerate, in the format of Kubernetes.",
    "cluster.node_selector": "Labels of the nodes on which workers may run, besides the VM size.",
    "cluster.priority_class": "Kubernetes priority class of all pods.",
    "cluster.setup": "Shell lines that every node executes before a run.",
    "cluster.env": "Names of environment variables that workers get from here; never their values.",
    "cluster.detach": "true: do not wait for a run on a remote cluster.",
    "sweep.sampler": "How trials are chosen: grid, random, tpe, gp, cmaes, nsga2, a sampler of Optuna or a _target_.",
    "sweep.sampler_options": "Arguments of the sampler's class, such as {multivariate: true} for tpe.",
    "sweep.trials": "Number of trials; null: every point of a grid.",
    "sweep.seed": "Seed of the sampler.",
    "sweep.metric": "Objective: a tag, or a list of tags; null: checkpoint.monitor.",
    "sweep.direction": "min or max of the objective, or a list of them; null: checkpoint.mode.",
    "sweep.pruner": "How bad trials are ended early: none, asha, hyperband, median, a pruner of Optuna or a _target_.",
    "sweep.pruner_options": "Arguments of the pruner's class, such as {percentile: 25} for PercentilePruner.",
    "sweep.min_evaluations": "Evaluations of a trial before it may be pruned.",
    "sweep.reduction": "Reduction factor of the successive halving of hyperband.",
    "sweep.keep": "Whose checkpoints are kept: those of all trials, or of the best.",
    "sweep.fail_fast": "true: end the sweep at the first failed trial.",
    "sweep.exit": "Exit status 1 if all trials failed (all_failed), or if any trial failed (any_failed).",
    "sweep.over": "A swept key whose values repeat each trial, such as trainer.seed; the best has the best mean.",
    "sweep.warm_start": "Another sweep over the same keys, from whose completed trials the sampler learns.",
    "sweep.concurrency": "Maximum number of trials at a time; null: as many as fit.",
    "model": "The network: a class by _target_ and its arguments; choose one with model=NAME.",
    "data": "The data sets: a class by _target_ and its arguments; choose one with data=NAME.",
    "optimizer": "The optimizer: a class by _target_ and its arguments; choose one with optimizer=NAME.",
    "scheduler": "The learning rate's schedule: a class by _target_ and its arguments; choose one with scheduler=NAME.",
    "optimizer.lr": "Learning rate, under this name for every optimizer.",
    "optimizer.groups": "Settings by pattern of parameter names: [{match: 'stem.*', freeze: true}]; first match wins.",
    "scheduler.interval": "When the schedule advances: after each step or each epoch.",
    "data.num_workers": "Loader processes of each worker, where the data set takes this argument.",
    "callbacks": "Name -> a class by _target_ and its arguments; choose some with callbacks=[ema,early_stopping].",
    "vars": "Values of your own, referred to as ${vars.name}.",
    "trust": "Packages whose classes a configuration may name; on the command line only.",
    "verbose": "true: show the messages of Ray and PyTorch, and tracebacks.",
}
SETTINGS = "docs/usage.md#settings"
PAGES = {
    "run": "docs/usage.md#stop-and-resume",
    "strategy": "docs/strategies.md#options",
    "cluster": "docs/clusters.md",
    "sweep": "docs/sweeps.md",
    "model": "docs/extending.md#methods-of-a-model",
    "data": "docs/extending.md#attributes-of-data",
    "optimizer": "docs/extending.md#optimizers-and-schedules",
    "scheduler": "docs/extending.md#optimizers-and-schedules",
    "callbacks": "docs/extending.md#callbacks",
    "trust": "docs/extending.md#which-code-a-configuration-may-name",
}


def meanings() -> dict[str, str]:
    """Return the sentence of every key, including those that cluster kinds bring along."""
    own = {f"cluster.{key}": text for kind in all_kinds().values() for key, text in kind.key_help.items()}
    return MEANING | own


def text(key: str) -> str:
    """Return what is shown of a key: type, default, meaning and the page that describes it.

    Raises:
        ConfigError: there is no such key.
    """
    section, _, last = key.partition(".")
    page, meaning_of = PAGES.get(section, SETTINGS), meanings()
    if key in leaves():
        default: Any = getattr(job_schema()(), section)
        default = getattr(default, last) if last else default
        shown = json.dumps(default, default=str)
        kind = type_name(key)
        first = f"{key}: default {shown}" if leaves()[key] is Any else f"{key}: {kind}, default {shown}"
        return f"{first}\n  {meaning_of.get(key, 'No description.')}\n  {page}"
    if inside := [name for name in leaves() if name.startswith(f"{key}.")]:
        lines = (f"  {name:<34} {meaning_of.get(name, '')}" for name in inside)
        return "\n".join([f"{key}: a section", *lines, f"  {page}"])
    if is_known(key):
        meaning = meaning_of.get(key, meaning_of[section])
        return f"{key}: an argument of the class that {section}._target_ names\n  {meaning}\n  {page}"
    raise ConfigError(f'"{key}" is no key of the configuration.{explain_unknown(key)}', key=key)
