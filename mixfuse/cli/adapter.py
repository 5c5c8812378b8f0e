"""`mixfuse adapter …`: adapter directories."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mixfuse.cli import options
from mixfuse.contracts.errors import MixfuseError, printable

if TYPE_CHECKING:
    from mixfuse.app.trial_engine import EngineChoice
    from mixfuse.contracts.adapter import Manifest


def register(commands: options.Commands) -> None:
    """Adds the parsers."""
    adapter = options.add_group(commands, "adapter", "export, check, publish, compare and sign adapter directories")
    _register_export_and_verify(adapter)
    _register_hub(adapter)
    _register_signing(adapter)
    _register_operations(adapter)


def _register_export_and_verify(adapter: options.Commands) -> None:
    export = options.add_command(
        adapter, "export", _export, "write an adapter directory that both PEFT and vLLM can apply"
    )
    export.add_argument("src", type=Path, metavar="SRC", help="a training run, or any PEFT adapter directory")
    export.add_argument("out", type=options.out_folder, metavar="OUT", help="the adapter directory to create")
    export.add_argument("--base", type=Path, metavar="DIR", help="the base model (default: the run's own)")
    export.add_argument(
        "--expert-columns",
        choices=("peft", "blocks"),
        help="the order of the experts' columns of B in a fused adapter (default: it is told from the file)",
    )
    export.add_argument("--role", help="what the adapter is for (default: the run's own role, else domain)")
    _add_full_hash(export)
    inspect = options.add_command(
        adapter,
        "inspect",
        _inspect,
        "say what an adapter is, who made it, and whether vLLM, PEFT and mixfuse apply all of it",
        "Exits with 1 if it can neither be served nor mended by export.",
    )
    inspect.add_argument("source", metavar="DIR|ORG/NAME[@REVISION]", help="a folder, or a repository on the Hub")
    inspect.add_argument("--base", type=Path, metavar="DIR", help="the base model, to compare with")
    options.add_json(inspect, "what was found")
    verify = options.add_command(
        adapter,
        "verify",
        _verify,
        "check an adapter directory: hashes, signature, shapes and base model",
        "With --base, --config or --url it also compares the log-probabilities of vLLM with those of PEFT.",
    )
    verify.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    verify.add_argument("--base", type=Path, metavar="DIR", help="the base model; compares vLLM with PEFT on it")
    options.add_engine(verify, "--url")
    _add_public_key(verify)
    _add_full_hash(verify)


def _register_hub(adapter: options.Commands) -> None:
    card = options.add_command(adapter, "card", _card, "rewrite and print the model card")
    card.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    card.add_argument("--base-model", metavar="ORG/NAME", help="the base model's name on the Hugging Face Hub")
    card.add_argument("--licence", metavar="ID", help="the adapter's licence, as the Hub spells it (apache-2.0)")
    push = options.add_command(
        adapter,
        "push",
        _push,
        "publish an adapter directory on the Hugging Face Hub",
        "Makes one commit, and a tag with the adapter's revision.",
    )
    push.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    push.add_argument("repo", metavar="ORG/NAME", help="the repository on the Hub; it is created if it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", default="main", metavar="BRANCH", help="the branch to commit to (default: main)")
    push.add_argument("--force", action="store_true", help="replace whatever the branch holds")
    push.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    pull = options.add_command(
        adapter, "pull", _pull, "download an adapter directory from the Hugging Face Hub and verify it"
    )
    pull.add_argument("source", metavar="ORG/NAME[@REVISION]", help="a branch, tag, commit or adapter revision")
    pull.add_argument("out", type=options.out_folder, metavar="OUT", help="the folder to create")
    pull.add_argument("--base", type=Path, metavar="DIR", help="refuse an adapter that was made for another base model")
    _add_public_key(pull)


def _register_signing(adapter: options.Commands) -> None:
    keygen = options.add_command(
        adapter, "keygen", _keygen, "create an Ed25519 key pair for signatures: FILE and FILE.pub"
    )
    keygen.add_argument("file", type=options.out_file, metavar="FILE", help="the private key to create")
    sign = options.add_command(
        adapter,
        "sign",
        _sign,
        "sign the manifest of an adapter directory",
        "The manifest holds the hash of every file, so the signature covers them all.",
    )
    sign.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="an Ed25519 private key (PEM)")


def _register_operations(adapter: options.Commands) -> None:
    diff = options.add_command(
        adapter, "diff", _diff, "compare two adapters: ranks, targets, norms and angles by layer and expert"
    )
    diff.add_argument("a", type=Path, metavar="A", help="an adapter directory")
    diff.add_argument("b", type=Path, metavar="B", help="another adapter directory")
    diff.add_argument("--plot", type=options.out_file, metavar="FILE", help="write heat maps to this PNG")
    options.add_json(diff)
    merge = options.add_command(
        adapter, "merge", _merge, "add an adapter to its base model and write a plain checkpoint"
    )
    merge.add_argument("dir", type=Path, metavar="DIR", help="the adapter directory")
    merge.add_argument("out", type=options.out_folder, metavar="OUT", help="the folder to create")
    merge.add_argument("--base", type=Path, metavar="DIR", help="the base model (default: as in the manifest)")
    merge.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare log-probabilities with PEFT's (default: if memory allows)",
    )


def _add_full_hash(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full-hash", action="store_true", help="hash every tensor of the base model, which reads all of its weights"
    )


def _add_public_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--public-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="accept only an adapter signed with this key; repeatable",
    )


def _export(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.export import export

    manifest = export(
        arguments.src,
        arguments.out,
        base=arguments.base,
        role=arguments.role,
        full_hash=arguments.full_hash,
        columns=arguments.expert_columns,
    )
    print(f"{arguments.out}: {_summary(manifest)}")


def _summary(manifest: "Manifest") -> str:
    trained = "attention and experts" if manifest.experts_trained else "attention"
    return f"{manifest.role} adapter, revision {manifest.revision}, rank {manifest.rank}, {trained}"


def _inspect(arguments: argparse.Namespace) -> int:
    from mixfuse.contracts.model_card import is_hub_id
    from mixfuse.train.adapters.inspect_adapter import inspect

    folder = Path(arguments.source)
    if folder.exists() or not is_hub_id(arguments.source.partition("@")[0]):
        found = inspect(folder, base=arguments.base)
    else:
        from mixfuse.app.hub import fetch

        with tempfile.TemporaryDirectory() as temporary:
            fetch(arguments.source, Path(temporary))
            found = inspect(Path(temporary), base=arguments.base, name=arguments.source)
    print(found)
    if arguments.json:
        print(json.dumps(found.to_json()))
    return 1 if found.mixfuse == "no" else 0


def _verify(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import check_applied, fingerprint, read_manifest, verify
    from mixfuse.contracts.adapter_weights import check_directory

    manifest = read_manifest(arguments.dir)
    choice = _engine_choice(arguments)
    on_engine = arguments.base is not None or choice.config is not None or choice.url is not None
    if not on_engine and (choice.dtype or choice.tensor_parallel_size):
        raise MixfuseError("--dtype and --tensor-parallel-size are of the engine that --base or --config compares with")
    base = arguments.base or Path(manifest.base_path)
    if on_engine and arguments.base is None and choice.config is not None:
        base = choice.engine(None, rank=manifest.rank).base
    known = None
    if on_engine or (base / "config.json").is_file():
        known = fingerprint(base, exact=arguments.full_hash)
    manifest = verify(arguments.dir, base=known, trusted=arguments.public_key)
    check_applied(arguments.dir)
    check_directory(arguments.dir, base=base if known else None)
    if arguments.full_hash and (known is None or manifest.base.tensors is None):
        raise MixfuseError(
            f"{arguments.dir}: no full hash to compare: "
            + (f"{base} is not here" if known is None else "it was exported without --full-hash")
        )
    if not on_engine:
        checks = (
            "hashes, shapes and base are right"
            if known
            else f"hashes and shapes are right ({printable(str(base))} is not here)"
        )
        signer = f"; signed with key {manifest.signature.public_key[:16]}…" if manifest.signature else ""
        effect = "not proven that an engine applies it (--base BASE compares vLLM with PEFT)"
        print(f"{arguments.dir}: revision {manifest.revision}: {checks}{signer}; {effect}")
        return
    from mixfuse.app.evaluate import verify_parity

    verified = verify_parity(arguments.dir, base, choice)
    parity = verified.parity
    print(
        f"{arguments.dir}: log-probs in vLLM ({parity.dtype}) and PEFT differ by {parity.deviation} over "
        f"{parity.tokens} tokens"
        + (f"; the base alone by {parity.base_deviation}" if parity.dtype != "float32" else "")
        + f"; the adapter moves them by up to {parity.adapter_effect:.2g}"
        + (f", its experts by {parity.expert_effect:.2g}" if parity.expert_effect else "")
        + "".join(f"; the engine shows {share}" for share in parity.shares)
        + (f"; its verdicts differ by up to {verified.verdicts:.2g}" if verified.verdicts is not None else "")
        + f"; {verified.stored}"
    )


def _engine_choice(arguments: argparse.Namespace) -> "EngineChoice":
    from mixfuse.app.trial_engine import EngineChoice

    return EngineChoice(arguments.config, arguments.dtype, arguments.tensor_parallel_size, arguments.engine_url)


def _card(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import verify
    from mixfuse.contracts.model_card import CARD, Named, renew

    manifest = verify(arguments.dir)
    renew(arguments.dir, manifest, Named(arguments.base_model, arguments.licence))
    print((arguments.dir / CARD).read_text(encoding="utf-8"), end="")
    if manifest.signature:
        print(
            "note: the new card made the signature invalid; sign again with: mixfuse adapter sign DIR --key FILE",
            file=sys.stderr,
        )


def _push(arguments: argparse.Namespace) -> None:
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
    for field, value in named(arguments.dir)._asdict().items():
        if value is None:
            option = f"--{field.replace('_', '-')}"
            print(
                f"note: the card names no {option[2:]}; add it with: mixfuse adapter card DIR {option} …",
                file=sys.stderr,
            )


def _pull(arguments: argparse.Namespace) -> None:
    from mixfuse.app.hub import pull

    pulled = pull(arguments.source, arguments.out, base=arguments.base, trusted=arguments.public_key)
    manifest = pulled.manifest
    origin = f"from {arguments.source} at commit {pulled.commit}" if pulled.commit else "was here already"
    print(f"{arguments.out}: {manifest.role} adapter, revision {manifest.revision}, {origin}")


def _keygen(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.signing import generate

    public = generate(arguments.file)
    print(f"{arguments.file}: the private key, keep it secret; {public}: the public key, for everyone who verifies")


def _sign(arguments: argparse.Namespace) -> None:
    from mixfuse.contracts.adapter import sign

    manifest = sign(arguments.dir, arguments.key)
    key = manifest.signature.public_key[:16] if manifest.signature else ""
    print(f"{arguments.dir}: revision {manifest.revision} signed with key {key}…")


def _diff(arguments: argparse.Namespace) -> None:
    from mixfuse.train.adapters.diff import diff, plot_difference, print_difference

    difference = diff(arguments.a, arguments.b)
    print_difference(difference)
    if arguments.plot:
        plot_difference(difference, arguments.plot)
        print(f"{arguments.plot}: heat maps")
    if arguments.json:
        print(json.dumps(difference.to_json()))


def _merge(arguments: argparse.Namespace) -> None:
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
