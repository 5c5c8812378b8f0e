"""`mixfuse adapter …`: adapter directories."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mixfuse.cli import options
from mixfuse.contracts.errors import MixfuseError

if TYPE_CHECKING:
    from mixfuse.contracts.adapter import Manifest


def register(commands: options.Commands) -> None:
    """Adds the parser of `mixfuse adapter`."""
    adapter = options.group(commands, "adapter", "adapter directories")
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


def _full_hash(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full-hash", action="store_true", help="of every tensor of the base: reads all of it")
