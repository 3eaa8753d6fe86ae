"""python -m minicode.interpret: what the codes of a run stand for, how well, and what they do when they are forced.

python -m minicode.interpret                         every measure: tables, interpret.json, report.html to look at
python -m minicode.interpret --search 'New (York)'   the codes that fire where a pattern, or its bracket, ends
python -m minicode.interpret --code mlp.1.527        where a code fires, in context
"""

import json
import re
from pathlib import Path

from minicode.control import Code
from minicode.language import topics
from minicode.runtime.options import Parser
from minicode.runtime.runs import latest_run, load_run
from minicode.study.detectors import record_codes
from minicode.study.lookup import look_up, search
from minicode.study.study import study


def main(argv=None):
    parser = Parser("interpret", __doc__)
    parser.add_argument("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    parser.add_argument(
        "--search",
        metavar="REGEX",
        help="list the codes that detect where the pattern, or its first bracket, ends",
    )
    parser.add_argument(
        "--precision", type=float, default=0.5, help="the least that --search lists (default: 0.5)"
    )
    parser.add_argument(
        "--recall", type=float, default=0.1, help="the least that --search lists (default: 0.1)"
    )
    parser.add_argument("--code", help="list where this code fires")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="RUN",
        help="another run on the same data: do its codes agree?",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="write the figures there too, as SVG files"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        other = load_run(args.compare) if args.compare else None
        for each in filter(None, (run, other)):
            each.sites()
        if other and other.data != run.data:
            raise ValueError(f"the runs in {run.folder} and {other.folder} are on different data")
        if other and other.config.block_size < run.config.block_size:
            raise ValueError(
                f"the block of {other.folder} is shorter than that of {run.folder}: compare them the other way round"
            )
        try:
            pattern = re.compile(args.search) if args.search is not None else None
        except re.error as error:
            raise ValueError(
                f"--search {args.search!r} is not a regular expression: {error}"
            ) from None
        wanted = Code.parse(args.code, run.model) if args.code else None
        tokens, kinds = topics.held_out(run)
        recording = record_codes(run.model, tokens)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
        if pattern is not None:
            result, text = search(run, recording, pattern, args)
        elif wanted:
            result, text = look_up(run, recording, kinds, wanted)
        else:
            result, text = study(run, recording, kinds, other, args.figures)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
