"""List the experiments: `python -m experiments`."""

from experiments import METHODS


def main() -> None:
    for method in METHODS:
        print(f"python -m experiments.{method.name}")
        print(f"    {method.title} (arXiv {method.arxiv}), {method.duration}")
        print(f"    claim: {method.claim}\n")
    print("Each takes --help. Default presets need no network.")


if __name__ == "__main__":
    main()
