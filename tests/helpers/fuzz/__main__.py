"""`make fuzz`: change what comes from outside at random, for some minutes; a fault is shown with the seed of its case."""

import argparse
import logging
import sys
import time
import warnings
from collections import Counter

from helpers.fuzz.harness import Tally, run_case
from helpers.fuzz.targets import attempts


def main() -> int:
    """Run it; 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow (default: 0)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    parser.add_argument("--cases", type=int, default=10**9, help="cases of each target at most")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    chosen = [(name, attempt) for name, attempt in attempts() if args.only in name]
    tallies = {name: Tally() for name, _ in chosen}
    spent: Counter = Counter()
    end, seed = time.monotonic() + 60 * args.minutes, args.seed
    while time.monotonic() < end and seed < args.seed + args.cases:
        for name, attempt in chosen:
            if spent[name] > 2 * min(spent.values(), default=0) + 1 and len(spent) == len(chosen):
                continue  # slow ones have fewer cases
            began = time.monotonic()
            run_case(tallies[name], name, attempt, seed)
            spent[name] += time.monotonic() - began
        seed += 1
    total: Counter = Counter()
    for name, tally in tallies.items():
        total += tally.counts
        print(f"{name:50} {dict(tally.counts)}")
        for place, (of, words) in tally.faults.items():
            print(f"  FAULT {place}: --only '{name}' --seed {of} --cases 1\n{words}")
    print(f"{'all':50} {dict(total)}")
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
