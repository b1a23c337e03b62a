"""lm-eval's class of API models against a server; it imports nothing else of the tests.

    python lm_eval_client.py < JOB

JOB is JSON: for each run the arguments of the class, pairs of context and continuation, texts that
are scored from their beginning, and contexts to continue. The scores are printed as JSON.
"""

import json
import logging
import sys

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def instances(kind, arguments):
    return [Instance(kind, {}, tuple(one), number) for number, one in enumerate(arguments)]


def run(settings, pairs, texts, contexts):
    model = LocalCompletionsAPI(tokenized_requests=True, max_retries=1, **settings)
    until = {"max_gen_toks": 2, "until": ["\0"], "temperature": 0}
    rolling = instances("loglikelihood_rolling", [(text,) for text in texts])
    asked = instances("generate_until", [(context, until) for context in contexts])
    return {
        "pairs": model.loglikelihood(instances("loglikelihood", pairs)),
        "texts": model.loglikelihood_rolling(rolling),
        "answers": model.generate_until(asked),
    }


if __name__ == "__main__":
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    found = {name: run(**one) for name, one in json.load(sys.stdin).items()}
    print(json.dumps({"version": lm_eval.__version__, "runs": found}))
