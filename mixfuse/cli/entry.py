"""The `mixfuse` command: arguments in, one call into a room out.

Rooms are imported inside the sub-commands, so that `mixfuse --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixfuse import __version__
from mixfuse.contracts.errors import MixfuseError, exit_code

if TYPE_CHECKING:
    from mixfuse.contracts.adapter import Manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0, 2 for something the user can mend (one line on standard error), 75 for a run that SIGTERM stopped, or 130
        after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        return exit_code(lambda: command(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixfuse", description="Tune Mixtral into a domain model and a judge; serve both; fuse."
    )
    parser.add_argument("--version", action="version", version=f"mixfuse {__version__}")
    top = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    base = _group(top, "base", "the embedded base model")
    build = base.add_parser("build", help="SmolLM2-135M upcycled into a Mixtral")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--experts", type=int, default=4, help="experts a layer (default 4)")
    build.add_argument("--tiny", action="store_true", help="a random two-layer Mixtral, for fast tests")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(command=_base_build)

    train = _group(top, "train", "fine-tune under DeepSpeed ZeRO-3")
    for stage, words in (
        ("sft", "the domain model, by supervised fine-tuning"),
        ("judge", "the judge, by DPO"),
    ):
        stage_parser = train.add_parser(stage, help=words)
        stage_parser.add_argument("recipe", type=Path, metavar="RECIPE")
        stage_parser.add_argument("overrides", nargs="*", metavar="key=value")
        stage_parser.set_defaults(command=_train, stage=stage)

    plan = top.add_parser("plan", help="what a recipe or a serve config takes, before anything is paid for")
    plan.add_argument("recipe", type=Path, metavar="RECIPE", help="of training, or a serve config")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default 1)")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs a host (default 8)")
    plan.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of one GPU (default 80GiB)")
    plan.add_argument("--host-memory", metavar="SIZE", help="of one host (default: not checked)")
    plan.add_argument("--reserve", default="4GiB", metavar="SIZE", help="kept free on a GPU (default 4GiB)")
    plan.add_argument("--model", type=Path, metavar="DIR", help="config.json of the base, where the base is not here")
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: G processes a host, no GPU")
    plan.add_argument("--tflops", type=float, default=989, help="a GPU's peak, for time (default 989: H100, bfloat16)")
    plan.add_argument("--utilisation", type=float, default=0.3, help="of the peak, assumed (default 0.3)")
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="a GPU receives (default 450, several nodes 50)")
    plan.add_argument("--concurrency", type=int, help="requests at once, for serving (default: the config's)")
    plan.add_argument("--header", action="store_true", help="only the line for a recipe's header")
    plan.add_argument("--json", action="store_true", help="one JSON object on the last line")
    plan.set_defaults(command=_plan)

    experts = _group(top, "experts", "the base model's experts")
    experts_profile = experts.add_parser("profile", help="which experts a recipe's data goes to, as a table and a plot")
    experts_profile.add_argument("recipe", type=Path, metavar="RECIPE")
    experts_profile.add_argument("overrides", nargs="*", metavar="key=value")
    experts_profile.add_argument("--out", type=Path, metavar="DIR", help="default: the recipe's `out` with -experts")
    experts_profile.add_argument("--json", action="store_true", help="one JSON object on the last line")
    experts_profile.set_defaults(command=_experts_profile)

    launch = top.add_parser("launch", help="a train or doctor command in several processes, on one machine or many")
    how = launch.add_mutually_exclusive_group(required=True)
    how.add_argument("--local", nargs="?", const="", metavar="N", help="N processes here (default: the recipe's)")
    how.add_argument("--torchrun", action="store_true", help="the same command on each host")
    how.add_argument("--deepspeed", type=Path, metavar="HOSTFILE", help="DeepSpeed's launcher")
    how.add_argument("--slurm", action="store_true", help="an sbatch file, and sbatch")
    launch.add_argument("--processes", type=int, metavar="N", help="on each machine (default: the recipe's)")
    launch.add_argument("--nodes", type=int, metavar="N", help="machines, for torchrun and Slurm")
    launch.add_argument("--hosts", default="", metavar="A,B,…", help="torchrun: the machines; they meet at the first")
    launch.add_argument("--rdzv", metavar="HOST[:PORT]", help="where the machines meet, if not at the first")
    launch.add_argument("--gpus-per-node", type=int, metavar="G", help="Slurm: GPUs to ask for (default: processes)")
    launch.add_argument("--grace", type=int, default=300, help="Slurm: seconds to save in (default 300)")
    launch.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="Slurm: a further option")
    launch.add_argument("--dry-run", action="store_true", help="print what would run")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, metavar="train … | experts profile … | doctor …")
    launch.set_defaults(command=_launch)

    doctor = top.add_parser("doctor", help="this machine; under `launch`, all machines and what lies between them")
    doctor.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="look at its base, disk and processes")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.add_argument("--nodes", type=int, metavar="N", help="how many machines there should be")
    doctor.add_argument("--json", action="store_true", help="one JSON object on the last line")
    doctor.set_defaults(command=_doctor)

    tasks = _group(top, "tasks", "tasks with verifiers")
    tasks_make = tasks.add_parser("make", help="chats to train on: each task with its reference answer")
    tasks_make.add_argument("tasks", type=Path, metavar="TASK_FILE")
    tasks_make.add_argument("--out", type=Path, required=True, metavar="FILE")
    tasks_make.add_argument("--split", choices=("train", "pool", "heldout"), default="train")
    tasks_make.add_argument("--count", type=int, default=100, help="how many tasks (default 100)")
    tasks_make.add_argument("--seed", type=int, default=0)
    tasks_make.set_defaults(command=_tasks_make)

    pool = _group(top, "pool", "the pool of models")
    collect = pool.add_parser("collect", help="ask every member, mark the answers with the tasks' verifiers")
    collect.add_argument("config", type=Path, metavar="CONFIG", help="the fusion config that names the members")
    collect.add_argument("--tasks", type=Path, required=True, help="a task file (configs/tiny/tasks.yaml)")
    collect.add_argument("--out", type=Path, required=True, metavar="FILE")
    collect.add_argument("--split", choices=("train", "pool", "heldout"), default="pool")
    collect.add_argument("--count", type=int, default=100, help="how many tasks (default 100)")
    collect.add_argument("--samples", type=int, default=2, help="answers a member and task (default 2)")
    collect.add_argument("--temperature", type=float, default=0.8)
    collect.add_argument("--max-tokens", type=int, default=64)
    collect.add_argument("--concurrency", type=int, default=8)
    collect.add_argument("--seed", type=int, default=0, help="of the tasks")
    _server(collect)
    collect.set_defaults(command=_pool_collect)

    pairs = _group(top, "pairs", "preference pairs")
    pairs_build = pairs.add_parser("build", help="both orders of every usable pair of answers, and a data card")
    pairs_build.add_argument("pool", type=Path, metavar="POOL_FILE|SPEC.yaml", help="pool rows, or several sources")
    pairs_build.add_argument("overrides", nargs="*", metavar="key=value", help="of the spec")
    pairs_build.add_argument("--out", type=Path, required=True, metavar="FILE")
    pairs_build.add_argument("--per-prompt", type=int, help="pairs of answers a prompt at most (default 2)")
    pairs_build.add_argument("--dev-share", type=float, help="share of the prompts for dev (default 0.1)")
    pairs_build.add_argument("--balance", metavar="TRAITS", help="length,style,model (default for a pool file: none)")
    pairs_build.add_argument("--near", type=float, help="prompts this alike are near duplicates (pool file: 1.0)")
    pairs_build.add_argument(
        "--against", type=Path, action="append", default=[], metavar="FILE", help="an evaluation set: kept apart"
    )
    pairs_build.add_argument("--seed", type=int)
    pairs_build.add_argument("--json", action="store_true", help="the data card as one JSON object on the last line")
    pairs_build.set_defaults(command=_pairs_build)
    rationales = pairs.add_parser("rationales", help="a judge's own rationales, kept by whether their verdict is right")
    rationales.add_argument("data", type=Path, metavar="FILE", help="labelled pairs or pool answers, as for eval judge")
    rationales.add_argument("--judge", required=True, metavar="MODEL", help="the model or role that writes them")
    rationales.add_argument("--out", type=Path, required=True, metavar="FILE")
    rationales.add_argument("--samples", type=int, default=4, help="of each order of each pair (default 4)")
    rationales.add_argument("--limit", type=int, help="only the first so many rows")
    rationales.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    _server(rationales)
    rationales.set_defaults(command=_pairs_rationales)

    adapter = _group(top, "adapter", "adapter directories")
    export = adapter.add_parser("export", help="an adapter directory that PEFT and vLLM both apply")
    export.add_argument("src", type=Path, metavar="SRC", help="a run, or any PEFT adapter directory")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--base", type=Path, help="the base model (default: the run's own)")
    export.add_argument("--role", help="the role (default: the run's own, else domain)")
    export.set_defaults(command=_adapter_export)
    _full_hash(export)
    verify = adapter.add_parser("verify", help="check hashes, fingerprint and shapes; with --base, parity too")
    verify.add_argument("dir", type=Path, metavar="DIR")
    verify.add_argument("--base", type=Path, help="the base model: compares PEFT's log-probs with vLLM's")
    verify.add_argument(
        "--public-key", type=Path, action="append", default=[], metavar="FILE", help="one of these must have signed it"
    )
    _full_hash(verify)
    verify.set_defaults(command=_adapter_verify)
    card = adapter.add_parser("card", help="renew and print the model card")
    card.add_argument("dir", type=Path, metavar="DIR")
    card.add_argument("--base-model", metavar="ORG/NAME", help="the base's name on the Hugging Face Hub")
    card.add_argument("--licence", metavar="ID", help="the adapter's licence as the Hub spells it, e.g. apache-2.0")
    card.set_defaults(command=_adapter_card)
    push = adapter.add_parser("push", help="publish on the Hugging Face Hub: one commit, and a tag of the revision")
    push.add_argument("dir", type=Path, metavar="DIR")
    push.add_argument("repo", metavar="ORG/NAME")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", default="main", metavar="BRANCH", help="the branch to commit to (default main)")
    push.add_argument("--force", action="store_true", help="take the place of another adapter")
    push.add_argument("--dry-run", action="store_true", help="say what would be sent")
    push.set_defaults(command=_adapter_push)
    pull = adapter.add_parser("pull", help="fetch an adapter directory from the Hugging Face Hub, and verify it")
    pull.add_argument("source", metavar="ORG/NAME[@REVISION]", help="a branch, tag, commit or adapter revision")
    pull.add_argument("out", type=Path, metavar="OUT")
    pull.add_argument("--base", type=Path, help="the base model it shall be applied to")
    pull.add_argument(
        "--public-key", type=Path, action="append", default=[], metavar="FILE", help="one of these must have signed it"
    )
    pull.set_defaults(command=_adapter_pull)
    keygen = adapter.add_parser("keygen", help="an Ed25519 key pair to sign with: FILE and FILE.pub")
    keygen.add_argument("file", type=Path, metavar="FILE")
    keygen.set_defaults(command=_adapter_keygen)
    sign = adapter.add_parser("sign", help="sign the manifest, and by its hashes every file")
    sign.add_argument("dir", type=Path, metavar="DIR")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="an Ed25519 private key (PEM)")
    sign.set_defaults(command=_adapter_sign)
    diff = adapter.add_parser("diff", help="ranks, targets, norms and angles of two adapters, by layer and expert")
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.add_argument("--plot", type=Path, metavar="FILE", help="heat maps, as a PNG")
    diff.add_argument("--json", action="store_true", help="one JSON object on the last line")
    diff.set_defaults(command=_adapter_diff)
    merge = adapter.add_parser("merge", help="the base with an adapter added to it, as a plain checkpoint")
    merge.add_argument("dir", type=Path, metavar="DIR")
    merge.add_argument("out", type=Path, metavar="OUT")
    merge.add_argument("--base", type=Path, help="the base model (default: where the manifest says)")
    merge.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare log-probs with PEFT's (default: where memory allows)",
    )
    merge.set_defaults(command=_adapter_merge)
    compose = adapter.add_parser("compose", help="a weighted sum of adapters, as one adapter")
    compose.add_argument("out", type=Path, metavar="OUT")
    compose.add_argument("parts", nargs="+", metavar="DIR[:WEIGHT]", help="an adapter directory; weight 1 by default")
    compose.add_argument(
        "--method",
        choices=("sum", "concat"),
        default="concat",
        help="concat is exact, ranks add up (default); sum takes the nearest adapter of --rank",
    )
    compose.add_argument("--rank", type=int, metavar="R", help="of a sum (default: the largest of the parts)")
    compose.add_argument("--role", help="the role (default: that of the first part)")
    compose.set_defaults(command=_adapter_compose)
    prune = adapter.add_parser("prune", help="the nearest adapter of a lower rank")
    prune.add_argument("dir", type=Path, metavar="DIR")
    prune.add_argument("out", type=Path, metavar="OUT")
    prune.add_argument("--rank", type=int, required=True, metavar="R")
    prune.add_argument("--json", action="store_true", help="one JSON object on the last line")
    prune.set_defaults(command=_adapter_prune)

    serve = top.add_parser("serve", help="vLLM with the adapters of each role, and the gateway in front")
    serve.add_argument("config", type=Path, metavar="CONFIG")
    serve.add_argument("overrides", nargs="*", metavar="key=value")
    serve.add_argument(
        "--dry-run", action="store_true", help="print vLLM's command and its memory plan; 1: does not fit"
    )
    serve.add_argument("--nodes", type=int, default=1, metavar="N", help="for the plan: hosts (default 1)")
    serve.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="G", help="for the plan: GPUs a host (default 8)"
    )
    serve.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="for the plan: of one GPU (default 80GiB)")
    serve.add_argument(
        "--model", type=Path, metavar="DIR", help="for the plan: config.json, where the base is not here"
    )
    serve.add_argument(
        "--device", choices=("cuda", "cpu"), help="for the plan (default: what the installed vLLM is for)"
    )
    serve.set_defaults(command=_serve)

    gateway = top.add_parser("gateway", help="the gateway by itself, for a pool that is served elsewhere")
    gateway.add_argument("config", type=Path, metavar="CONFIG", help="a fusion config")
    gateway.add_argument("overrides", nargs="*", metavar="key=value")
    gateway.add_argument("--host", default="127.0.0.1")
    gateway.add_argument("--port", type=int, default=8080, help="0 takes any free one (default 8080)")
    gateway.add_argument(
        "--drain-s", type=int, default=10, help="seconds that requests under way may take after SIGTERM (default 10)"
    )
    gateway.set_defaults(command=_gateway)

    roles = _group(top, "roles", "the roles of a running server")
    roles_list = roles.add_parser("list", help="which adapter revision serves each role")
    roles_list.set_defaults(command=_roles_list)
    swap = roles.add_parser("swap", help="serve a role by another adapter, without restart")
    swap.add_argument("role", metavar="ROLE")
    swap.add_argument("dir", type=Path, metavar="DIR")
    swap.add_argument("--shadow", type=int, metavar="N", help="first, N live requests are done again by the new one")
    swap.add_argument("--canary", metavar="SHARE", help="then it is given this share of the requests (10%%)")
    swap.add_argument("--for", dest="for_", metavar="TIME", help="how long it is a canary (90s, 10m, 2h)")
    swap.add_argument("--requests", type=int, metavar="N", help="or until N requests have met it")
    swap.add_argument("--timeout", default="10m", metavar="TIME", help="to wait for those requests (default 10m)")
    swap.add_argument(
        "--limit", action="append", default=[], metavar="NAME=VALUE", help="instead of the serve config's `gate.NAME`"
    )
    swap.set_defaults(command=_roles_swap)
    rollback = roles.add_parser("rollback", help="serve a role by what served it before; again and again goes on back")
    rollback.add_argument("role", metavar="ROLE")
    rollback.add_argument(
        "--db", metavar="PATH_OR_URL", help="change the role table in this trace_db, without a server"
    )
    rollback.set_defaults(command=_roles_rollback)
    roles_history = roles.add_parser("history", help="what happened to a role, newest first")
    roles_history.add_argument("role", metavar="ROLE")
    roles_history.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N (default 20)")
    roles_history.set_defaults(command=_roles_history)
    pin = roles.add_parser("pin", help="a role's adapter stays loaded, whatever needs a place in the engine")
    pin.add_argument("role", metavar="ROLE")
    pin.set_defaults(command=_roles_pin, pinned=True)
    unpin = roles.add_parser("unpin", help="a role's adapter may make room for another")
    unpin.add_argument("role", metavar="ROLE")
    unpin.set_defaults(command=_roles_pin, pinned=False)
    for of_roles in (roles_list, swap, rollback, roles_history, pin, unpin):
        of_roles.add_argument("--json", action="store_true", help="JSON instead of words")
        _server(of_roles)

    keys = _group(top, "keys", "the gateway's API keys")
    keys_add = keys.add_parser("add", help="make a key; it is shown this once")
    keys_add.add_argument("name", metavar="NAME", help="whose it is")
    keys_add.add_argument("--budget", type=float, metavar="DOLLARS", help="the most it may spend in a period")
    keys_add.add_argument("--tokens", type=int, metavar="N", help="the most tokens it may use in a period")
    keys_add.add_argument("--period", choices=("day", "month", "total"), default="month")
    keys_add.add_argument("--rate", type=int, metavar="N", help="requests a minute")
    _database(keys_add)
    keys_add.set_defaults(command=_keys_add)
    keys_list = keys.add_parser("list", help="keys, their limits and what they used")
    _database(keys_list)
    keys_list.set_defaults(command=_keys_list)
    keys_revoke = keys.add_parser("revoke", help="end a key")
    keys_revoke.add_argument("name", metavar="NAME", help="its name or id")
    _database(keys_revoke)
    keys_revoke.set_defaults(command=_keys_revoke)

    traces = _group(top, "traces", "what the gateway did")
    traces_export = traces.add_parser("export", help="traces as pool responses, for mixfuse pairs build")
    traces_export.add_argument("--out", type=Path, required=True, metavar="FILE")
    traces_export.add_argument(
        "--label",
        choices=("feedback", "judge"),
        default="feedback",
        help="whose word says which answers are right: users' (default), or the judge's own",
    )
    traces_export.add_argument("--tasks", type=Path, help="a task file: its verifiers say which answers are right")
    traces_export.add_argument("--split", choices=("train", "pool", "heldout"), default="pool")
    traces_export.add_argument("--count", type=int, default=100, help="how many tasks of the file (default 100)")
    traces_export.add_argument("--seed", type=int, default=0, help="of the tasks")
    traces_export.add_argument("--days", type=float, help="only traces of the last so many days")
    traces_export.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="leave out users who agree with others less often than this",
    )
    _database(traces_export)
    traces_export.set_defaults(command=_traces_export)

    ask = top.add_parser("ask", help="one fused answer, with who said what and why it won")
    ask.add_argument("prompt", metavar="PROMPT")
    ask.add_argument("--mode", choices=("best_of", "merge", "debate"), default="best_of")
    ask.add_argument("--max-tokens", type=int)
    ask.add_argument("--temperature", type=float)
    _server(ask)
    ask.set_defaults(command=_ask)

    loop = top.add_parser("loop", help="from the traces since the last round to a better judge, or why not")
    loop.add_argument("config", type=Path, metavar="CONFIG")
    loop.add_argument("overrides", nargs="*", metavar="key=value")
    loop.add_argument("--json", action="store_true", help="the decision as one JSON object on the last line")
    loop.set_defaults(command=_loop)

    evaluate = _group(top, "eval", "measure")
    judge = evaluate.add_parser("judge", help="both-orders-correct and more, beside the simple baselines")
    judge.add_argument(
        "--judge", required=True, metavar="REF", help="an adapter directory, or a role of a running server"
    )
    judge.add_argument(
        "--data", required=True, type=Path, nargs="+", metavar="FILE", help="labelled pairs, of ours or a benchmark's"
    )
    judge.add_argument("--against", action="append", default=[], metavar="REF", help="a judge to compare it with")
    judge.add_argument("--baseline", choices=("untrained",), help="compare it with its base as well")
    judge.add_argument("--out", type=Path, metavar="DIR", help="write the report, with plots, and every verdict here")
    judge.add_argument("--cache", type=Path, metavar="FILE", help="keeps verdicts (default: in --out)")
    judge.add_argument("--base", type=Path, help="the base of an adapter directory (default: the one it was made on)")
    judge.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file")
    judge.add_argument("--concurrency", type=int, default=8)
    judge.add_argument("--json", action="store_true", help="one JSON object on the last line")
    _server(judge)
    judge.set_defaults(command=_eval_judge)
    fusing = evaluate.add_parser("fusion", help="does fusing help? each mode beside members, majority, equal compute")
    fusing.add_argument("config", type=Path, metavar="CONFIG", help="the fusion config the gateway runs with")
    what = fusing.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", type=Path, metavar="FILE", help="a task file (configs/tiny/tasks.yaml)")
    what.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="rows with a prompt and a reference")
    fusing.add_argument(
        "--verifier",
        choices=("exact", "number", "json", "regex", "reasoning-gym"),
        help="who says what is right: the answer and the reference say the same (--data), or reasoning-gym (--tasks)",
    )
    fusing.add_argument("--split", choices=("train", "pool", "heldout"), default="heldout", help="of a task file")
    fusing.add_argument("--count", type=int, default=100, help="how many tasks of a task file (default 100)")
    fusing.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file of --data")
    fusing.add_argument(
        "--modes", nargs="+", choices=("best_of", "merge", "debate"), default=["best_of", "merge", "debate"]
    )
    fusing.add_argument(
        "--choose-share", type=float, default=0.3, help="of the tasks, to choose the best member on (default 0.3)"
    )
    fusing.add_argument("--temperature", type=float, help="default: each member's own")
    fusing.add_argument("--max-tokens", type=int, help="default: each member's own")
    fusing.add_argument("--seed", type=int, default=0, help="of the tasks and the answers")
    fusing.add_argument("--concurrency", type=int, default=4, help="requests at once; latencies are with so many")
    fusing.add_argument("--out", type=Path, metavar="DIR", help="write the report, with plots, and every answer here")
    fusing.add_argument("--cache", type=Path, metavar="FILE", help="keeps answers (default: in --out)")
    fusing.add_argument("--json", action="store_true", help="one JSON object on the last line")
    _server(fusing)
    fusing.set_defaults(command=_eval_fusion)
    return parser


def _group(
    top: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, words: str
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    return top.add_parser(name, help=words, description=words).add_subparsers(required=True, metavar="COMMAND")


def _server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("MIXFUSE_URL", "http://127.0.0.1:8080"),
        help="the running server (default $MIXFUSE_URL or http://127.0.0.1:8080)",
    )


def _database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--db",
        default=os.environ.get("MIXFUSE_TRACE_DB", "runs/traces.sqlite3"),
        metavar="PATH_OR_URL",
        help="the gateway's trace_db (default $MIXFUSE_TRACE_DB or runs/traces.sqlite3)",
    )


def _full_hash(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full-hash", action="store_true", help="of every tensor of the base: reads all of it")


def _base_build(arguments: argparse.Namespace) -> None:
    from mixfuse.train.model.embedded_base import build

    facts = build(arguments.out, experts=arguments.experts, tiny=arguments.tiny, seed=arguments.seed)
    equal = facts.get("max_logit_difference")
    words = f"; logits equal the dense model's to {equal:.1e}" if equal is not None else ""
    size = f"{facts['parameters'] / 1e6:.0f} M parameters"
    print(f"{arguments.out}: Mixtral with {arguments.experts} experts, {size}{words}")


def _train(arguments: argparse.Namespace) -> None:
    from mixfuse.train.run import start

    start(arguments.stage, arguments.recipe, arguments.overrides)


def _experts_profile(arguments: argparse.Namespace) -> None:
    from mixfuse.train.model.choose_experts import profile

    record = profile(arguments.recipe, arguments.overrides, arguments.out)
    if arguments.json:
        print(json.dumps(record))


def _launch(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.launch import launch

    command, processes = arguments.arguments, arguments.processes
    if arguments.local and arguments.local.isdecimal():
        processes = int(arguments.local)
    elif arguments.local:  # `--local train …`: what follows is no number, so it belongs to the command
        command = [arguments.local, *command]
    modes = {"deepspeed": arguments.deepspeed, "torchrun": arguments.torchrun, "slurm": arguments.slurm}
    return launch(
        command,
        mode=next((name for name, chosen in modes.items() if chosen), "local"),
        processes=processes,
        hostfile=arguments.deepspeed,
        hosts=[host for host in arguments.hosts.split(",") if host],
        nodes=arguments.nodes,
        rendezvous=arguments.rdzv,
        gpus=arguments.gpus_per_node,
        grace=arguments.grace,
        options=arguments.sbatch,
        dry_run=arguments.dry_run,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from mixfuse.train.launching.doctor import run

    return run(arguments.recipe, arguments.overrides, nodes=arguments.nodes, as_json=arguments.json)


def _tasks_make(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.files import write_jsonl
    from mixfuse.contracts.tasks import make

    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    count = write_jsonl(arguments.out, (task.chat() for task in tasks))
    print(f"{arguments.out}: {count} chats")


def _plan(arguments: argparse.Namespace) -> None:
    from mixfuse.app.planning import run

    run(arguments)


def _pairs_build(arguments: argparse.Namespace) -> None:
    from mixfuse.app import preferences
    from mixfuse.train.data import data_card

    names = ("per_prompt", "dev_share", "near", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.balance is not None:
        given["balance"] = [trait for trait in arguments.balance.split(",") if trait and trait != "none"]
    if arguments.against:
        given["against"] = [str(path) for path in arguments.against]
    spec = preferences.read_spec(arguments.pool, given, arguments.overrides)
    card = preferences.build(spec, arguments.out)
    for line in data_card.lines(card):
        print(line)
    prompts = card["prompts"]
    print(
        f"{arguments.out}: train pairs {card['train_pairs']}, dev pairs {card['dev_pairs']} (two rows a pair), of "
        f"{prompts['train']} and {prompts['dev']} prompts; {arguments.out.stem}.card.md says more"
    )
    if arguments.json:
        print(json.dumps(card))


def _pairs_rationales(arguments: argparse.Namespace) -> None:
    import asyncio

    from mixfuse.contracts.files import write_jsonl
    from mixfuse.fusion.calls.upstream import Endpoint
    from mixfuse.fusion.labels.rationales import sample
    from mixfuse.fusion.measure.comparisons import load

    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
    endpoint = Endpoint(f"{arguments.url.rstrip('/')}/v1", arguments.judge, key)
    rows, counts = asyncio.run(sample(endpoint, load(arguments.data, limit=arguments.limit), samples=arguments.samples))
    write_jsonl(arguments.out, rows)
    print(f"{arguments.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def _pool_collect(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.strict_yaml import load
    from mixfuse.contracts.tasks import Task, TaskSet, make
    from mixfuse.fusion.batch import Sampling
    from mixfuse.fusion.config import FusionConfig
    from mixfuse.fusion.labels.collect import collect_answers

    tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    collect_answers(
        load(arguments.config, FusionConfig),
        arguments.url,
        TaskSet(tasks, Task.verify),
        Sampling(arguments.temperature, arguments.max_tokens, arguments.seed),
        arguments.out,
        samples=arguments.samples,
        concurrency=arguments.concurrency,
    )


def _adapter_export(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.export import export

    manifest = export(
        arguments.src, arguments.out, base=arguments.base, role=arguments.role, full_hash=arguments.full_hash
    )
    print(f"{arguments.out}: {_described(manifest)}")


def _described(manifest: "Manifest") -> str:
    what = "attention and experts" if manifest.experts_trained else "attention"
    return f"{manifest.role} adapter, revision {manifest.revision}, rank {manifest.rank}, {what}"


def _adapter_verify(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import fingerprint, read_manifest, verify

    base = arguments.base or Path(read_manifest(arguments.dir).base_path)
    known = None
    if arguments.base is not None or (base / "config.json").is_file():
        known = fingerprint(base, exact=arguments.full_hash)
    manifest = verify(arguments.dir, base=known, trusted=arguments.public_key)
    if arguments.full_hash and (known is None or manifest.base.tensors is None):
        raise MixfuseError(
            f"{arguments.dir}: no full hash to compare: "
            + (f"{base} is not here" if known is None else "it was exported without --full-hash")
        )
    if arguments.base is None:
        found = "hashes, shapes and base are right" if known else f"hashes and shapes are right ({base} is not here)"
        by = f"; signed with key {manifest.signature.public_key[:16]}…" if manifest.signature else ""
        print(f"{arguments.dir}: revision {manifest.revision}: {found}{by}")
        return
    from mixfuse.app.evaluate import verify_parity

    parity = verify_parity(arguments.dir, arguments.base)
    print(
        f"{arguments.dir}: log-probs in vLLM and PEFT differ by at most {parity.max_abs_logprob_difference:.1e} "
        f"(tolerance {parity.tolerance:.0e}) over {parity.tokens} tokens; the adapter moves them by up to "
        f"{parity.adapter_effect:.2g}"
        + (f", its experts by {parity.expert_effect:.2g}" if parity.expert_effect else "")
    )


def _adapter_card(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import verify
    from mixfuse.contracts.model_card import CARD, Named, renew

    manifest = verify(arguments.dir)
    renew(arguments.dir, manifest, Named(arguments.base_model, arguments.licence))
    print((arguments.dir / CARD).read_text(encoding="utf-8"), end="")
    if manifest.signature:
        print("note: its signature was of the old card; mixfuse adapter sign DIR --key FILE", file=sys.stderr)


def _adapter_push(arguments: argparse.Namespace) -> None:
    from mixfuse.app.hub import push, report
    from mixfuse.contracts.model_card import named

    pushed = push(
        arguments.dir,
        arguments.repo,
        private=arguments.private,
        branch=arguments.revision,
        force=arguments.force,
        dry_run=arguments.dry_run,
    )
    print(report(pushed))
    for what, said in named(arguments.dir)._asdict().items():
        if said is None:
            option = f"--{what.replace('_', '-')}"
            print(f"note: the card names no {option[2:]}; mixfuse adapter card DIR {option} …", file=sys.stderr)


def _adapter_pull(arguments: argparse.Namespace) -> None:
    from mixfuse.app.hub import pull

    pulled = pull(arguments.source, arguments.out, base=arguments.base, trusted=arguments.public_key)
    manifest = pulled.manifest
    whence = f"from {arguments.source} at commit {pulled.commit}" if pulled.commit else "was here already"
    print(f"{arguments.out}: {manifest.role} adapter, revision {manifest.revision}, {whence}")


def _adapter_keygen(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.signing import generate

    public = generate(arguments.file)
    print(f"{arguments.file}: keep it to yourself; {public}: for all who verify")


def _adapter_sign(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import sign

    manifest = sign(arguments.dir, arguments.key)
    by = manifest.signature.public_key[:16] if manifest.signature else ""
    print(f"{arguments.dir}: revision {manifest.revision} signed with key {by}…")


def _adapter_diff(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.diff import diff, plot_difference, print_difference

    difference = diff(arguments.a, arguments.b)
    print_difference(difference)
    if arguments.plot:
        plot_difference(difference, arguments.plot)
        print(f"{arguments.plot}: heat maps")
    if arguments.json:
        print(json.dumps(difference.to_json()))


def _adapter_merge(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.merge_into_base import merge

    merged = merge(arguments.dir, arguments.out, base=arguments.base, check=arguments.check)
    print(f"{arguments.out}: {merged.tensors} tensors changed, in {merged.files} weight files")
    if merged.check is None:
        print(f"not compared with PEFT: {merged.skipped}")
        return
    print(
        f"log-probs in transformers and PEFT differ by at most {merged.check.difference:.1e}; rounding to the base's "
        f"type moved them by up to {merged.check.rounding:.1e}, the adapter by {merged.check.effect:.2g}"
    )


def _adapter_compose(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.ops import compose

    composed = compose(
        [_weighted(part) for part in arguments.parts],
        arguments.out,
        method=arguments.method,
        rank=arguments.rank,
        role=arguments.role,
    )
    error = f"off the weighted sum by {composed.relative_error:.1e} of its norm"
    print(f"{arguments.out}: {_described(composed.manifest)}; {error}")


def _weighted(part: str) -> tuple[Path, float]:
    """`DIR[:WEIGHT]`; what follows the last colon may belong to the folder's name."""
    directory, colon, weight = part.rpartition(":")
    if not colon or Path(part).is_dir():
        return Path(part), 1.0
    try:
        return Path(directory), float(weight)
    except ValueError:
        raise MixfuseError(f"{part!r} is not of the form DIR:WEIGHT, the weight a number") from None


def _adapter_prune(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.ops import print_energies, prune

    pruned = prune(arguments.dir, arguments.out, rank=arguments.rank)
    print_energies(pruned)
    print(f"{arguments.out}: {_described(pruned.manifest)}; keeps {pruned.share:.2%} of the adapter's energy")
    if arguments.json:
        print(json.dumps(pruned.to_json()))


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from mixfuse.app.planning import dry_run

        return dry_run(arguments)
    from mixfuse.app.server import run

    run(arguments.config, arguments.overrides)
    return 0


def _gateway(arguments: argparse.Namespace) -> None:
    from mixfuse.app.server import GatewayConfig, run_gateway
    from mixfuse.contracts.strict_yaml import validate

    address = validate(
        {"host": arguments.host, "port": arguments.port, "drain_s": arguments.drain_s},
        GatewayConfig,
        source="mixfuse gateway",
    )
    run_gateway(arguments.config, arguments.overrides, address)


def _keys_add(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import create

    with opened(arguments.db) as database:
        key, secret = create(
            database,
            arguments.name,
            max_cost=arguments.budget,
            max_tokens=arguments.tokens,
            period=arguments.period,
            per_minute=arguments.rate,
        )
    print(f"{key.name} ({key.id}); the key is shown this once:", file=sys.stderr)
    print(secret)


def _keys_list(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import show

    with opened(arguments.db, create=False) as database:
        show(database)


def _keys_revoke(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.http.keys import revoke

    with opened(arguments.db, create=False) as database:
        key = revoke(database, arguments.name)
    print(f"{key.name} ({key.id}) is revoked")


def _traces_export(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.database import opened
    from mixfuse.fusion.store.export_traces import export

    tasks = None
    if arguments.tasks is not None:
        from mixfuse.contracts.tasks import make

        tasks = make(arguments.tasks, arguments.split, arguments.count, seed=arguments.seed)
    with opened(arguments.db, create=False) as database:
        counts = export(
            database,
            arguments.out,
            label=arguments.label,
            tasks=tasks,
            days=arguments.days,
            min_agreement=arguments.min_agreement,
        )
    print(f"{arguments.out}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))


def _roles_list(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import list_roles

    list_roles(arguments.url, as_json=arguments.json)


def _roles_swap(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import seconds, share, swap_role, swap_through_gate
    from mixfuse.contracts.strict_yaml import override

    gate = {
        "shadow": arguments.shadow,
        "canary": share(arguments.canary) if arguments.canary else None,
        "for_s": seconds(arguments.for_) if arguments.for_ else None,
        "requests": arguments.requests,
        "limits": override({}, arguments.limit),
    }
    if not any(gate.values()):
        swap_role(arguments.url, arguments.role, arguments.dir, as_json=arguments.json)
        return
    gate |= {"timeout_s": seconds(arguments.timeout)}
    swap_through_gate(arguments.url, arguments.role, arguments.dir, gate, as_json=arguments.json)


def _roles_rollback(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import roll_role_back, roll_stored_role_back

    if arguments.db is not None:
        roll_stored_role_back(arguments.db, arguments.role, as_json=arguments.json)
    else:
        roll_role_back(arguments.url, arguments.role, as_json=arguments.json)


def _roles_history(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import show_history

    show_history(arguments.url, arguments.role, limit=arguments.limit, as_json=arguments.json)


def _roles_pin(arguments: argparse.Namespace) -> None:
    from mixfuse.app.roles_admin import pin_role

    pin_role(arguments.url, arguments.role, arguments.pinned, as_json=arguments.json)


def _ask(arguments: argparse.Namespace) -> None:
    from mixfuse.fusion.http.ask import run

    run(
        arguments.prompt,
        mode=arguments.mode,
        url=arguments.url,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
    )


def _loop(arguments: argparse.Namespace) -> None:
    from mixfuse.app import loop
    from mixfuse.contracts.strict_yaml import load

    decision = loop.run(load(arguments.config, loop.LoopConfig, arguments.overrides))
    for line in loop.lines(decision) if decision else ():
        print(line)
    if arguments.json:
        print(json.dumps(decision))


def _eval_judge(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import Judges, eval_judge, server_at
    from mixfuse.fusion.batch import Results

    report = eval_judge(
        Judges(arguments.judge, arguments.against, arguments.baseline == "untrained", arguments.base),
        arguments.data,
        server_at(arguments.url),
        Results(arguments.out, arguments.cache),
        limit=arguments.limit,
        concurrency=arguments.concurrency,
    )
    if arguments.json:
        print(json.dumps(report.to_json()))


def _eval_fusion(arguments: argparse.Namespace) -> None:
    from mixfuse.app.evaluate import TaskSource, eval_fusion, server_at
    from mixfuse.fusion.batch import Results, Sampling
    from mixfuse.fusion.measure.eval_fusion import Design

    report = eval_fusion(
        arguments.config,
        TaskSource(
            tasks=arguments.tasks,
            split=arguments.split,
            count=arguments.count,
            data=arguments.data or (),
            limit=arguments.limit,
            verifier=arguments.verifier,
        ),
        server_at(arguments.url),
        Design(
            modes=arguments.modes,
            choose_share=arguments.choose_share,
            sampling=Sampling(arguments.temperature, arguments.max_tokens, arguments.seed),
            concurrency=arguments.concurrency,
        ),
        Results(arguments.out, arguments.cache),
    )
    if arguments.json:
        print(json.dumps(report.to_json()))
