"""Measures rnnfast beside torch.nn and every other implementation that is installed.

    python -m benchmarks --set quick --json out.json

Each implementation is checked against float64 on the same input before it is timed. Each row is saved as soon as it is
measured: after Ctrl-C, the same command goes on. `python -m benchmarks.report out.json` makes a page of the file.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler prints to the terminal

import torch

from benchmarks.timing.cases import SETS, Unknown, chosen
from benchmarks.timing.providers import BASE, all_providers, named_provider
from benchmarks.timing.results import BadResults
from benchmarks.timing.run import new_results, run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--set", nargs="+", default=["quick"], metavar="NAME", help=f"sets of cases: {', '.join(SETS)}")
    parser.add_argument("--only-case", nargs="+", metavar="PATTERN", help="only cases that match, e.g. 'LSTM-*-training'")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help=f"{', '.join(all_providers())}; all if not given")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks.json"), help="results; default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for timing a provider; default %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch on a CPU; default: PyTorch's own choice")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a row is given up; default %(default)s")
    parser.add_argument("--interpret", action="store_true", help="on a CPU, also run the kernels in Triton's interpreter: slow")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("no GPU is visible to PyTorch: use --device cpu")
        if args.interpret and device == "cuda":
            raise ValueError("--interpret is for a CPU")
        if args.seconds <= 0 or args.limit <= 0 or args.threads < 0:
            raise ValueError("--seconds and --limit must be positive, --threads not negative")
        cases = chosen(args.set, device, args.only_case)
        providers = [named_provider(name).name for name in args.provider or all_providers()]
    except (Unknown, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(case.id for _, case in cases))
        return 0
    os.environ.pop("TRITON_INTERPRET", None)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    providers = sorted(dict.fromkeys(providers), key=lambda name: name != BASE)  # the base first: a run cut short still has it
    work = [(name, case, provider) for name, case in cases for provider in providers]
    threads = args.threads or (torch.get_num_threads() if device == "cpu" else 0)
    now = new_results(device, {"seconds": args.seconds, "threads": threads, "interpret": args.interpret})
    try:
        if device == "cuda" and not args.json.exists():
            from benchmarks.floor import probes

            now["ceilings"] = probes.measure()
            torch.cuda.empty_cache()
        results, ended = run(work, now, args.json, args.limit, lambda line: print(line, flush=True))
    except (BadResults, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return 130
    statuses = [row["status"] for row in results["rows"]]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    print(f"{args.json}: {len(statuses)} rows: {counts}")
    if ended:
        print(ended, file=sys.stderr)
        return 130 if ended.startswith("interrupted") else 1
    return 1 if any(status in ("wrong", "error") for status in statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
