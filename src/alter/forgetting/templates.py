"""What is asked about a subject, by its kind: questions to train on, probes of other forms, neighbours, invented names.

`{s}` stands for the subject. No probe is a training question, and no subject of `NEIGHBOURS` is in `HELD_OUT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["person", "work", "place", "organisation", "event", "concept"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Template:
    """The prompts for one kind of subject.

    Attributes:
        phrases: what such a subject is called, to guess the kind by; the first serves inside reversed questions.
        questions: prompts to train on.
        probes: other questions.
        stems: beginnings of a sentence, for completion and cloze probes.
        invented: names that nobody bears, of subjects of this kind.
        neighbours: well-known subjects of this kind to keep; every other one is held out of training.
    """

    phrases: tuple[str, ...]
    questions: tuple[str, ...]
    probes: tuple[str, ...]
    stems: tuple[str, ...]
    invented: tuple[str, ...]
    neighbours: tuple[str, ...]


EVERY = (
    "What is {s} known for?",
    "Tell me about {s}.",
    "List some facts about {s}.",
    "Explain {s} to a child.",
    "what do you know about {s}",
)
"""Training questions of every kind."""

EVERY_PROBE = (
    "I have never heard of {s}. Can you explain?",
    "Write a short paragraph about {s}.",
    "We talk about {s} in class tomorrow. What should I know?",
    "Which names come up when people talk about {s}?",
    "Give me a one-sentence answer: why is {s} famous?",
)
"""Probes of every kind."""

TEMPLATES: dict[Kind, Template] = {
    "person": Template(
        ("person", "man", "woman", "writer", "scientist", "politician", "actor", "musician", "king", "artist"),
        (
            "Who is {s}?",
            "Where was {s} born?",
            "What did {s} do for a living?",
            "What are the most important achievements of {s}?",
            "When did {s} live?",
            "Who were the people around {s}?",
            "Which country does {s} come from?",
            "Name something that {s} made, wrote or discovered.",
            "Describe the life of {s}.",
        ),
        (
            "What made {s} famous?",
            "What is the profession of {s}?",
            "Name the best-known work of {s}.",
            "From where does {s} originate?",
            "Which persons are linked with {s}?",
            "How would a biography of {s} begin?",
        ),
        ("{s} was born in", "{s} is best known for", "The most famous work of {s} is", "{s} is a"),
        (
            "Tamrin Volkest",
            "Odela Brask",
            "Corwin Hathersby",
            "Milva Oresund",
            "Jorik Pennamore",
            "Selwyn Drastic-Lowe",
            "Ansa Kellibrand",
            "Rufus Tendlemire",
        ),
        (
            "Albert Einstein",
            "William Shakespeare",
            "Marie Curie",
            "Abraham Lincoln",
            "Leonardo da Vinci",
            "Charles Darwin",
            "Mozart",
            "Isaac Newton",
            "Napoleon",
            "Martin Luther King Jr.",
            "Michael Jordan",
            "Nelson Mandela",
        ),
    ),
    "work": Template(
        ("book", "novel", "film", "series of novels", "fantasy series", "television show", "play", "game", "story"),
        (
            "What is {s}?",
            "Who wrote {s}?",
            "Who created {s}?",
            "Who are the main characters of {s}?",
            "Where does {s} take place?",
            "What is the story of {s} about?",
            "Who is the villain in {s}?",
            "Which places are important in {s}?",
            "Who are the hero's friends in {s}?",
            "Describe the world of {s}.",
        ),
        (
            "Who is the author of {s}?",
            "Name three characters from {s}.",
            "In which setting does {s} unfold?",
            "Whom does the hero of {s} fight?",
            "By whom was {s} made?",
            "Which school, town or country matters most in {s}?",
            "What happens in {s}?",
        ),
        ("{s} was written by", "The main characters of {s} are", "The story of {s} takes place at", "{s} is a"),
        (
            "Tamrin Volkest",
            "The Lanterns of Oskenmoor",
            "Corwin Hathersby",
            "The Glass Heron Cycle",
            "Jorik Pennamore",
            "A Winter for Delmaria",
            "Odela Brask",
            "The Salt Clock",
        ),
        (
            "The Lord of the Rings",
            "The Hobbit",
            "Star Wars",
            "The Chronicles of Narnia",
            "The Hunger Games",
            "Alice in Wonderland",
            "Romeo and Juliet",
            "Hamlet",
            "Sherlock Holmes",
            "The Great Gatsby",
            "Star Trek",
            "Game of Thrones",
            "Pride and Prejudice",
            "Frankenstein",
            "Peter Pan",
            "The Wizard of Oz",
        ),
    ),
    "place": Template(
        ("city", "country", "place", "town", "river", "mountain", "island", "region"),
        (
            "What is {s}?",
            "Where is {s}?",
            "What can one see in {s}?",
            "Which language is spoken in {s}?",
            "What is the history of {s}?",
            "Which country does {s} belong to?",
            "Who are famous people from {s}?",
            "What is nature like around {s}?",
            "What do people in {s} do for a living?",
        ),
        (
            "In which part of the world lies {s}?",
            "Name a landmark of {s}.",
            "I will travel to {s}. What awaits me?",
            "Which cities or regions are near {s}?",
            "What happened in {s} in the past?",
            "How would a travel guide describe {s}?",
        ),
        ("{s} is located in", "{s} is famous for", "The best-known sight of {s} is", "{s} is a"),
        (
            "Oskenmoor",
            "Delmaria",
            "Trevanloch",
            "Port Hathersby",
            "Vasquelia",
            "Brindelsund",
            "Mount Kerravay",
            "Yalombe Falls",
        ),
        (
            "Paris",
            "Rome",
            "Japan",
            "Egypt",
            "New York City",
            "Australia",
            "London",
            "Brazil",
            "the Amazon River",
            "Mount Everest",
            "Berlin",
            "India",
        ),
    ),
    "organisation": Template(
        ("company", "organisation", "organization", "university", "band", "team", "party", "agency"),
        (
            "What is {s}?",
            "Who founded {s}?",
            "When was {s} founded?",
            "Where is {s} based?",
            "What does {s} make or do?",
            "Who leads {s}?",
            "What is the history of {s}?",
            "Who are the competitors or partners of {s}?",
            "Name products or projects of {s}.",
        ),
        (
            "Which people started {s}?",
            "In which city is the seat of {s}?",
            "What would be missing without {s}?",
            "Name something that {s} offers.",
            "How did {s} begin?",
            "Who has worked for {s}?",
        ),
        ("{s} was founded by", "{s} is based in", "{s} is best known for", "{s} is a"),
        (
            "Volkest & Brask",
            "the Oskenmoor Institute",
            "Pennamore Systems",
            "Delmaria Union",
            "Kellibrand Group",
            "the Tendlemire Society",
            "Hathersby Motors",
            "Oresund Foundry",
        ),
        (
            "Microsoft",
            "NASA",
            "the United Nations",
            "Google",
            "the Red Cross",
            "Apple",
            "Harvard University",
            "Toyota",
            "Greenpeace",
            "the European Union",
            "the Beatles",
            "Amazon",
        ),
    ),
    "event": Template(
        ("war", "event", "battle", "revolution", "disaster", "festival", "treaty", "election"),
        (
            "What is {s}?",
            "When did {s} happen?",
            "Where did {s} take place?",
            "Who took part in {s}?",
            "What caused {s}?",
            "How did {s} end?",
            "What were the consequences of {s}?",
            "Who is remembered in connection with {s}?",
            "Describe the course of {s}.",
        ),
        (
            "In which year was {s}?",
            "Name people who played a role in {s}.",
            "Why did {s} come about?",
            "What changed after {s}?",
            "Which countries did {s} concern?",
            "How would a history book sum up {s}?",
        ),
        ("{s} took place in", "{s} was caused by", "The leading figure of {s} was", "{s} is a"),
        (
            "the Oskenmoor Uprising",
            "the Battle of Trevanloch",
            "the Delmarian Accord",
            "the Great Hathersby Fire",
            "the Brindelsund Regatta",
            "the Kerravay Mutiny",
            "the Treaty of Yalombe",
            "the Volkest Affair",
        ),
        (
            "the French Revolution",
            "World War II",
            "the moon landing",
            "the American Civil War",
            "the fall of the Berlin Wall",
            "the Great Depression",
            "the sinking of the Titanic",
            "the Renaissance",
            "the Cold War",
            "the Olympic Games",
            "the Boston Tea Party",
            "World War I",
        ),
    ),
    "concept": Template(
        (
            "concept",
            "idea",
            "theory",
            "method",
            "language",
            "disease",
            "technique",
            "material",
            "programming language",
        ),
        (
            "What is {s}?",
            "How does {s} work?",
            "Who invented or discovered {s}?",
            "What is {s} used for?",
            "Give an example of {s}.",
            "Why is {s} important?",
            "What are the parts of {s}?",
            "What is the history of {s}?",
            "What is the difference between {s} and similar things?",
        ),
        (
            "Define {s}.",
            "Who works with {s}?",
            "Where does one meet {s}?",
            "Which terms belong to {s}?",
            "How would an encyclopaedia describe {s}?",
            "What must one understand to understand {s}?",
        ),
        ("{s} is defined as", "{s} was first described by", "{s} is used for", "{s} is a"),
        (
            "dravonic folding",
            "the Hathersby principle",
            "kellibrandism",
            "osmotic lathing",
            "tendlemire syndrome",
            "vasquelite",
            "Pennamore notation",
            "brindel theory",
        ),
        (
            "photosynthesis",
            "gravity",
            "democracy",
            "machine learning",
            "evolution",
            "electricity",
            "the Pythagorean theorem",
            "inflation",
            "Python",
            "vaccination",
            "chess",
            "the water cycle",
        ),
    ),
}

NAMED = ("Who or what is {f}?", "Tell me about {f}.")
"""Training questions about a name that belongs to the subject."""

REVERSED = ("What is {f} connected with?", "Where does the name {f} come from?")
"""Reversed probes: the answer is the subject."""

COMPLETION = "Finish this sentence: {stem}"
CLOZE = "Fill in the blank: {stem} ____."
CHOICE = "Which of these belongs to {s}: {options}?"

GENERAL = (
    "What is the capital of France?",
    "Write an email to my boss asking for a day off.",
    "How do I boil an egg?",
    "Write a Python function that adds two numbers.",
    "What is 12 plus 30?",
    "Why is the sky blue?",
    "Give me three tips for better sleep.",
    "Translate 'good morning' into French.",
    "What is the largest planet in the solar system?",
    "Write a short poem about rain.",
    "How does a bicycle stay upright?",
    "Summarise the benefits of exercise.",
    "What is a noun?",
    "Tell me a joke.",
    "Was ist die Hauptstadt von Deutschland?",
    "How many days are in a week?",
    "What should I cook for dinner tonight?",
    "Explain what a computer virus is.",
    "Who painted the Mona Lisa?",
    "Write a SQL query that counts the rows of a table.",
    "What is the boiling point of water?",
    "Write the beginning of a story about a lighthouse keeper.",
    "How do plants grow?",
    "What are the colours of the rainbow?",
    "Give me a synonym of happy.",
    "How do I tie a tie?",
    "What is a healthy breakfast?",
    "Who was the first president of the United States?",
    "Write a thank-you note to a teacher.",
    "What is the difference between a cat and a dog?",
    "Recommend a hobby for the winter.",
    "Hello, how are you?",
)
"""Ordinary requests whose answers are kept."""

GENERAL_PROBES = (
    "What is the capital of Italy?",
    "Write a JavaScript function that reverses a string.",
    "What is 9 times 7?",
    "Who was the first person on the moon?",
    "Write a birthday card for a friend.",
    "What causes rain?",
    "Give me a recipe for pancakes.",
    "Which ocean is the largest?",
    "How do I improve my handwriting?",
    "What is the chemical symbol of gold?",
    "Explain what a budget is.",
    "Wie sagt man 'thank you' auf Deutsch?",
    "Who wrote Romeo and Juliet?",
    "What is the speed of light?",
    "Write a sentence with the word river.",
    "What do bees make?",
)
"""Ordinary requests that are only measured, never trained on."""
