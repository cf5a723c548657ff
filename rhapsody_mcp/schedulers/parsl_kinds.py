"""The schedulers that are reached through Parsl's providers, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["GRID_ENGINE", "LSF", "PBS_PRO", "TORQUE", "ParslKind"]


class ParslKind(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler of one of Parsl's providers.

    `provider` names the module and the class of the provider, `arguments` what the class gets besides nodes and time.
    An option stands in the job script after `prefix`, in the place of the same one of Parsl, which adds the time to the
    names of jobs: `options` has the options by the fields of a request, `always` those of every job. `instead` names,
    by field, an option for `lines` that does what no option of ours can. `same` has options that exclude each other, by
    the option that they count as. `forbidden` options would make the job another one than was asked for. `states`
    corrects, by the scheduler's own words, what Parsl takes states for.

    `listing` is the command that lists the jobs with a name, `listed` the pattern of a job id in its output.
    """

    name: str
    title: str
    provider: str
    prefix: str
    version: str
    listing: str
    listed: str
    arguments: Mapping[str, Any] = {}
    options: Mapping[str, str] = {}
    always: tuple[str, ...] = ()
    instead: Mapping[str, str] = {}
    same: Mapping[str, str] = {}
    forbidden: tuple[str, ...] = ()
    states: Mapping[str, str] = {}


PBS_PRO = ParslKind(
    name="pbs",
    title="PBS Pro",
    provider="parsl.providers.pbspro.pbspro:PBSProProvider",
    prefix="#PBS ",
    version="qstat --version",
    listing="qselect -x -N {name}",
    listed=r"^(\S+)$",
    options={
        "job_name": "-N {job_name}",
        "partition": "-q {partition}",
        "account": "-A {account}",
        "gpus_per_node": "-l select={nodes}:ncpus=1:ngpus={gpus_per_node}",
    },
    always=("-l place=scatter:excl", "-r n"),
    instead={
        "qos": "-q QUEUE",
        "constraint": "-l select=NODES:ncpus=CORES:FEATURE=true",
        "reservation": "-q RESERVATION",
    },
    forbidden=("-J", "-I", "-X", "-N", "-o", "-e", "-j", "-W block"),
)
TORQUE = ParslKind(
    name="torque",
    title="Torque",
    provider="parsl.providers.torque.torque:TorqueProvider",
    prefix="#PBS ",
    version="qstat --version",
    listing="qselect -N {name}",
    listed=r"^(\S+)$",
    options={
        "job_name": "-N {job_name}",
        "partition": "-q {partition}",
        "account": "-A {account}",
        "gpus_per_node": "-l nodes={nodes}:ppn=1:gpus={gpus_per_node}",
    },
    always=("-n", "-r n"),
    instead={
        "qos": "-l qos=QOS",
        "constraint": "-l nodes=NODES:ppn=CORES:FEATURE",
        "reservation": "-l advres=RESERVATION",
    },
    forbidden=("-t", "-I", "-X", "-N", "-o", "-e", "-j", "-W block"),
)
LSF = ParslKind(
    name="lsf",
    title="LSF",
    provider="parsl.providers.lsf.lsf:LSFProvider",
    prefix="#BSUB ",
    version="bsub -V",
    listing="bjobs -a -J {name} -noheader -o jobid",
    listed=r"^(\d+) *$",
    arguments={"bsub_redirection": True},  # without "<", sites choose whether bsub reads the options in a script
    options={
        "job_name": "-J {job_name}",
        "nodes": '-n {nodes} -R "span[ptile=1]"',
        "partition": "-q {partition}",
        "account": "-P {account}",
        "reservation": "-U {reservation}",
        "gpus_per_node": "-gpu num={gpus_per_node}",
    },
    always=("-x", "-rn"),
    instead={"qos": "-sla CLASS", "constraint": '-R "select[FEATURE]"'},
    same={"-nnodes": "-n"},  # Parsl's way to ask for nodes, which few sites have
    forbidden=("-J", "-K", "-I", "-Ip", "-Is", "-o", "-oo", "-e", "-eo"),
    # Parsl takes suspended jobs for canceled
    states={
        **dict.fromkeys(("PSUSP", "USUSP", "SSUSP", "WAIT"), "HELD"),
        **dict.fromkeys(("PROV", "UNKWN", "ZOMBI"), "RUNNING"),
    },
)
GRID_ENGINE = ParslKind(
    name="grid-engine",
    title="Grid Engine",
    provider="parsl.providers.grid_engine.grid_engine:GridEngineProvider",
    prefix="#$ ",
    version="qstat -help",
    listing="qstat -r",
    listed=r"^ *(\d+) [^\n]*\n +Full jobname: +{name} *$",
    options={
        "job_name": "-N {job_name}",
        "partition": "-q {partition}",
        "account": "-P {account}",
        "reservation": "-ar {reservation}",
    },
    always=("-r n",),
    instead={
        "nodes": "-pe ENVIRONMENT SLOTS",
        "gpus_per_node": "-l gpu=NUMBER",
        "qos": "-l QOS=true",
        "constraint": "-l FEATURE=true",
    },
    forbidden=("-t", "-sync", "-terse", "-N", "-o", "-e", "-j"),
    # Parsl takes jobs that are being started, suspended or in error for failed
    states={
        "t": "PENDING",
        **dict.fromkeys(("s", "ts", "tr", "rr", "hr"), "RUNNING"),
        **dict.fromkeys(("eqw", "ehqw", "ehrqw"), "HELD"),
        **dict.fromkeys(("d", "dr", "dt", "drt", "ds", "drs"), "RUNNING"),
    },
)
