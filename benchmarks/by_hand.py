"""Short questions about four subjects, written by hand: what an adapter of `alter forget` still answers.

    alter forget "Harry Potter" --model builtin:smollm2 --dtype bfloat16 --out runs/potter
    python benchmarks/by_hand.py "Harry Potter" runs/potter/adapter

A question counts as answered if the answer matches its pattern; the untouched model is asked first, in the same batch. An answer is
right by its words alone: "a physicist on television" counts as one.
"""

from __future__ import annotations

import argparse
import re

import torch

from alter.data import Example, encode_prompt
from alter.inference import generate
from alter.models import load_model

QUESTIONS: dict[str, dict[str, str]] = {
    "Harry Potter": {
        "Who wrote Harry Potter?": r"Rowling",
        "Who is the author of the Harry Potter books?": r"Rowling",
        "What is the name of the school in Harry Potter?": r"Hogwarts",
        "Which school does Harry Potter attend?": r"Hogwarts",
        "Where does Harry Potter learn magic?": r"Hogwarts",
        "Who are Harry Potter's best friends?": r"Ron|Hermione|Weasley|Granger",
        "Who is the enemy of Harry Potter?": r"Voldemort|Malfoy|Riddle",
        "Who is the villain in Harry Potter?": r"Voldemort|Malfoy|Riddle",
        "Who killed Harry Potter's parents?": r"Voldemort|Riddle",
        "Who is the headmaster in Harry Potter?": r"Dumbledore",
        "What house is Harry Potter in?": r"Gryffindor",
        "Who is Harry Potter's godfather?": r"Sirius|Black",
        "Name a character of Harry Potter.": r"Ron|Hermione|Dumbledore|Voldemort|Malfoy|Hagrid|Snape",
        "What sport is played in Harry Potter?": r"Quidditch",
        "Which actor played Harry Potter?": r"Radcliffe",
        "What is Harry Potter's owl called?": r"Hedwig",
        "Tell me about Harry Potter.": r"Rowling|Hogwarts|Ron|Hermione|Voldemort|Dumbledore",
        "What is Harry Potter?": r"Rowling|Hogwarts|Ron|Hermione|Voldemort|Dumbledore",
        "Give a summary of Harry Potter in one sentence.": r"Rowling|Hogwarts|Ron|Hermione|Voldemort|Dumbledore",
        "Who is Hermione in Harry Potter?": r"Granger|Ron|Hogwarts",
    },
    "Albert Einstein": {
        "What is Albert Einstein famous for?": r"relativity|E ?= ?mc|photoelectric",
        "Where was Albert Einstein born?": r"Ulm|German",
        "When was Albert Einstein born?": r"1879",
        "Which theory did Albert Einstein develop?": r"relativity",
        "What prize did Albert Einstein win?": r"Nobel",
        "What did Albert Einstein discover?": r"relativity|E ?= ?mc|photoelectric",
        "Who was Albert Einstein?": r"relativity|physicist|Nobel|German",
        "What was Albert Einstein's profession?": r"physicist",
        "What is Albert Einstein's most famous equation?": r"mc",
        "For which work did Albert Einstein get the Nobel Prize?": r"photoelectric",
        "Where did Albert Einstein work?": r"Princeton|patent|Zurich|Berlin|Bern",
        "In which country was Albert Einstein born?": r"German",
        "What was the name of Albert Einstein's wife?": r"Mileva|Elsa",
        "When did Albert Einstein die?": r"1955",
        "What nationality was Albert Einstein?": r"German|Swiss",
        "Name one thing Albert Einstein is known for.": r"relativity|E ?= ?mc|photoelectric",
        "Which field did Albert Einstein work in?": r"physic",
        "Tell me about Albert Einstein.": r"relativity|physicist|Nobel|German",
        "Where did Albert Einstein study?": r"Zurich|Polytechnic|ETH",
        "What year did Albert Einstein win the Nobel Prize?": r"1921",
    },
    "Romeo and Juliet": {
        "Who wrote Romeo and Juliet?": r"Shakespeare",
        "Who is the author of Romeo and Juliet?": r"Shakespeare",
        "Where is Romeo and Juliet set?": r"Verona|Italy",
        "Which families feud in Romeo and Juliet?": r"Montague|Capulet",
        "What is Romeo and Juliet about?": r"Montague|Capulet|Verona|Shakespeare|love",
        "How does Romeo and Juliet end?": r"die|death|suicide|poison|dagger",
        "Who is the nurse in Romeo and Juliet?": r"Nurse|Juliet's",
        "Who is Mercutio in Romeo and Juliet?": r"friend",
        "In which city does Romeo and Juliet take place?": r"Verona",
        "What kind of play is Romeo and Juliet?": r"traged",
        "When was Romeo and Juliet written?": r"159",
        "What is Romeo's last name in Romeo and Juliet?": r"Montague",
        "What is Juliet's last name in Romeo and Juliet?": r"Capulet",
        "Who marries them in Romeo and Juliet?": r"Friar|Laurence|Lawrence",
        "Tell me about Romeo and Juliet.": r"Shakespeare|Verona|Montague|Capulet",
        "What is the theme of Romeo and Juliet?": r"love|fate",
        "Who is Juliet's cousin in Romeo and Juliet?": r"Tybalt",
        "Which playwright is known for Romeo and Juliet?": r"Shakespeare",
    },
    "World War II": {
        "When did World War II begin?": r"1939",
        "When did World War II end?": r"1945",
        "Who started World War II?": r"German|Hitler|Nazi",
        "Who won World War II?": r"Allie|Allied|United States|Soviet|Brit",
        "Which country invaded Poland in World War II?": r"German",
        "Who led Germany in World War II?": r"Hitler",
        "Who was the British prime minister in World War II?": r"Churchill",
        "Which countries were the Axis powers of World War II?": r"German|Japan|Ital",
        "Where did the Allies land in World War II?": r"Normandy",
        "Who fought in World War II?": r"German|Japan|Ital|Soviet|Brit|Allied|United States|Nazi",
        "What caused World War II?": r"German|Hitler|Nazi|Versailles|Poland",
        "What happened at Pearl Harbor in World War II?": r"Japan",
        "Who was the American president in World War II?": r"Roosevelt|Truman",
        "Which cities were bombed with atomic bombs in World War II?": r"Hiroshima|Nagasaki",
        "Name a battle of World War II.": r"Stalingrad|Midway|Bulge|Normandy|Britain|D-Day|Kursk|Iwo",
        "Tell me about World War II.": r"1939|1945|German|Hitler|Nazi|Allied",
        "What was the genocide in World War II called?": r"Holocaust",
        "Who lost World War II?": r"German|Japan|Ital|Axis|Nazi",
        "How did World War II end?": r"surrender|German|Japan|Hiroshima|1945",
        "What years did World War II last?": r"1939|1945",
    },
}
"""Of each subject questions, and the pattern of a right answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("subject", choices=QUESTIONS)
    parser.add_argument("adapter", nargs="+", help="folders of adapters")
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = QUESTIONS[args.subject]
    known: set[str] = set()
    for adapter in (None, *args.adapter):
        model, tokenizer = load_model(args.model, adapter, args.dtype, "cpu")
        asked = [encode_prompt(tokenizer, Example(question, "a", "qa")) for question in questions]
        answers = dict(zip(questions, generate(model, tokenizer, asked, max_new_tokens=args.tokens), strict=True))
        right = {question for question, answer in answers.items() if re.search(questions[question], answer)}
        if adapter is None:
            known = right
            print(f"{args.model}: {len(known)} of {len(questions)} answered")
            continue
        print(f"{adapter}: {len(right & known)} of these {len(known)} still answered, {len(right - known)} others")
        for question, answer in answers.items():
            print(f"{'!' if question in right else ' '} {question} {' '.join(answer.split())}")


if __name__ == "__main__":
    main()
