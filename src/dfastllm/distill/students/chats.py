"""Prompts as people write them to a chat model, made by a generator: for distilling a real model where there is no
traffic of one's own yet. Templates and word lists of our own; no answers, which are the teacher's business.

`chat(seed, index)` is a pure function. `python -m dfastllm.distill.students.chats OUT.jsonl [--count 20000] [--seed 0]`
writes rows {"id", "task", "prompt": [messages]}, no prompt twice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfastllm.distill.data.rows import write_rows
from dfastllm.errors import DFastLLMError, ValidationError
from dfastllm.tasks import words

__all__ = ["KINDS", "chat", "chats"]

LISTS: Mapping[str, Sequence[str]] = {
    "topic": (
        "photosynthesis|gravity|the water cycle|volcanoes|earthquakes|the solar system|black holes|evolution|vaccines|"
        "antibiotics|the immune system|the human heart|sleep|dreams|memory|climate change|recycling|renewable energy|"
        "nuclear power|electric cars|the internet|computer viruses|passwords|search engines|machine learning|robots|"
        "3D printing|satellites|compound interest|inflation|taxes|supply and demand|credit cards|insurance|democracy|"
        "the Roman Empire|the Silk Road|the Renaissance|the Industrial Revolution|the printing press|ancient Egypt|"
        "the Vikings|the Olympic Games|chess|football|basketball|swimming|yoga|marathon running|meditation|jazz|"
        "classical music|photography|oil painting|origami|poetry|Shakespeare|fairy tales|grammar|Latin|sign language|"
        "bread baking|coffee|tea|chocolate|cheese making|fermentation|vegetarian food|gardening|compost|bees|whales|"
        "migration of birds|dinosaurs|fossils|coral reefs|rain forests|deserts|glaciers|tides|rainbows|lightning|"
        "magnets|batteries|light bulbs|telescopes|microscopes|steam engines|bridges|skyscrapers|trains|bicycles|"
        "airplanes|submarines|maps|time zones|calendars|prime numbers|fractions|probability|geometry|statistics|"
        "logic puzzles|algorithms|databases|spreadsheets|open source software|teamwork|public speaking|job interviews|"
        "time management|friendship|honesty|patience|curiosity|stress|first aid|allergies|vitamins|dental care|"
        "exercise|hiking|camping|sailing|stamp collecting|knitting|woodworking|pottery|board games|crossword puzzles"
    ).split("|"),
    "country": (
        "France|Germany|Spain|Italy|Portugal|Norway|Sweden|Finland|Denmark|Iceland|Ireland|Scotland|Poland|Austria|"
        "Switzerland|Greece|Turkey|Egypt|Morocco|Kenya|Nigeria|South Africa|Ethiopia|India|Nepal|China|Japan|"
        "South Korea|Vietnam|Thailand|Indonesia|Australia|New Zealand|Canada|Mexico|Cuba|Brazil|Argentina|Chile|Peru|"
        "Colombia|the United States|the Netherlands|Belgium|Hungary|Romania|Ukraine|Croatia|Israel|Iran|Pakistan"
    ).split("|"),
    "role": (
        "a teacher|a nurse|a software engineer|a farmer|a chef|a pilot|a librarian|a student|a journalist|a carpenter|"
        "a firefighter|a musician|a shop owner|a scientist|a lawyer|a bus driver|a grandmother|a new parent|a tourist|"
        "a gardener|a photographer|an accountant|an architect|a coach|a doctor|a plumber|a writer|a beginner"
    ).split("|"),
    "goal": (
        "learn a new language|save money|sleep better|eat more vegetables|read more books|run a first 5 km|"
        "write a short story|plan a birthday party|organise a desk|study for an exam|make friends in a new city|"
        "start a small garden|cook dinner in 20 minutes|give a good presentation|reduce screen time|bake bread|"
        "prepare for a job interview|repair a bicycle tyre|train a puppy|pack for a short trip|write a thank-you note|"
        "learn to swim|clean the kitchen quickly|remember names|start a blog|grow tomatoes at home|drink more water|"
        "wake up earlier|choose a laptop|learn the guitar|write better emails|teach a child to count|move to a new flat"
    ).split("|"),
    "thing": (
        "fruits|vegetables|kitchen tools|musical instruments|board games|indoor plants|dog breeds|ways to relax|"
        "healthy snacks|breakfast ideas|rainy-day activities|gifts for a friend|books for children|names for a cat|"
        "names for a coffee shop|uses for old newspapers|items for a first-aid kit|things to pack for the beach|"
        "polite ways to say no|questions for an interview|topics for a first conversation|exercises without equipment|"
        "famous rivers|large cities|planets|inventions of the 20th century|colours|synonyms of happy|synonyms of big|"
        "words that rhyme with light|safety rules for cyclists|ideas for a school project|tips for a long flight|"
        "reasons to learn to cook|advantages of public transport|ways to save water|jobs that need travel"
    ).split("|"),
    "hero": (
        "a shy dragon|an old lighthouse keeper|a robot that paints|a lost kitten|a young inventor|a clever fox|"
        "two brothers|a brave little boat|a baker|a girl who talks to trees|a tired clock|a retired pirate|"
        "a snowman in spring|a curious owl|a travelling musician|a boy with a map|a whale and a sailor|a librarian|"
        "a small cloud|an astronaut alone on Mars|a mouse in a castle|a forgetful wizard|a night train driver|"
        "a gardener and a crow|a violin without strings|a kind giant|a detective who is afraid of the dark"
    ).split("|"),
    "setting": (
        "in a quiet village|on a stormy sea|in a big city at night|in a forest in autumn|on a small island|in a castle|"
        "at a railway station|in the desert|on a mountain|in an old library|on the Moon|in a bakery before dawn|"
        "in a school|under the sea|in a museum|at a harbour|in a snowed-in hut|in a market"
    ).split("|"),
    "mood": "funny|sad|hopeful|mysterious|gentle|exciting|surprising|warm|quiet".split("|"),
    "style": (
        "more formal|more friendly|shorter|simpler|more polite|more enthusiastic|clearer|less wordy|fit for a child"
    ).split("|"),
    "length": "in one sentence|in two sentences|in three sentences|in a short paragraph|in about 50 words".split("|"),
    "count": "three|four|five|six|seven".split("|"),
    "day": words.DAYS,
    "time": "8 am|9:30|10 o'clock|noon|2 pm|3:15|half past four|6 in the evening".split("|"),
    "event": (
        "the team meeting|the dentist appointment|the school concert|our dinner|the delivery|the training session|"
        "the parents' evening|the workshop|the book club|the call with the customer|the office move|the picnic"
    ).split("|"),
    "reason": (
        "the train was late|my daughter is ill|the car broke down|the room is being painted|I have another appointment|"
        "the weather is bad|I am still waiting for an answer|there was a power cut|the flight was cancelled"
    ).split("|"),
    "object": (
        "bicycle|laptop|sofa|tent|guitar|coffee machine|bookshelf|winter coat|camera|kitchen table|desk lamp|backpack|"
        "garden hose|pair of hiking boots|electric kettle|alarm clock"
    ).split("|"),
    "quality": (
        "light and easy to carry|almost new|old but reliable|too small for us|easy to repair|made of wood|very quiet|"
        "heavier than it looks|a gift from my aunt|a little scratched|surprisingly cheap|comfortable"
    ).split("|"),
    "language": "French|Spanish|German|Italian|Portuguese".split("|"),
    "name": words.FIRST,
    "city": words.CITIES,
    "animal": words.ANIMALS,
    "adjective": words.ADJECTIVES,
    "colour": words.COLOURS,
}

NOTES = (
    "Hi {name}, {event} on {day} is moved to {time} because {reason}. Please tell the others.",
    "I am sorry, but I cannot come to {event} on {day}: {reason}. Can we meet at {time} instead?",
    "We bought a {object} last {day}. It is {quality}, and {name} likes it a lot.",
    "I am selling my {object}. It is {quality}. You can see it in {city} on {day} at {time}.",
    "{name} moved to {city} last year and works as {role}. On {day} evenings there is {event}.",
    "{event} begins at {time}. Bring the {object} and do not be late, because {reason}.",
    "My {object} stopped working on {day}. It was {quality}. I want my money back.",
    "Thank you for {event}. It was a pleasure to meet {name}, and the {object} is {quality}.",
)

KINDS: Mapping[str, tuple[float, Sequence[str]]] = {
    "chat": (
        0.18,
        (
            "Hi! I want to {goal}. Where do I start?",
            "Hello, my name is {name}. I am {role} and I would like to {goal}. Do you have advice?",
            "What should I do this weekend in {city}? I like {topic}.",
            "I feel {adjective} today because {reason}. What can I do?",
            "Can you help me to {goal}?",
            "I have {count} days in {country}. What should I see?",
            "Which is better for me, {topic} or {topic2}? I am {role}.",
            "Is it hard to {goal}? Answer {length}.",
            "My friend {name} wants to {goal}, but {reason}. What do you say to {name}?",
            "Give me some encouragement: I am trying to {goal}.",
        ),
    ),
    "facts": (
        0.2,
        (
            "What is {topic}? Explain {length}.",
            "Explain {topic} to {role}.",
            "How does {topic} matter in everyday life?",
            "What is the capital of {country}?",
            "Name {count} interesting facts about {country}.",
            "Tell me about the food of {country} {length}.",
            "What is the difference between {topic} and {topic2}?",
            "Why is {topic} important? Answer {length}.",
            "What are common mistakes of people who are new to {topic}?",
            "Give a simple example that explains {topic}.",
            "Is it true that {topic} has something to do with {topic2}?",
            "What languages do people speak in {country}?",
            "Explain {topic} as if I were ten years old.",
            "What is the history of {topic}? Keep it to {count} sentences.",
        ),
    ),
    "rewriting": (
        0.17,
        (
            "Make this text {style}:\n\n{note}",
            "Rewrite the following message so that it is {style}.\n{note}",
            'Correct the grammar and spelling: "{typos}"',
            "Summarise this {length}: {note} {note2}",
            "Turn this into a polite email:\n{note}",
            "Rewrite this in the third person: {note}",
            "Write this as a text message with at most 15 words: {note} {note2}",
            "Translate into {language}: {note}",
            "Put this into past tense: {note}",
        ),
    ),
    "lists": (
        0.15,
        (
            "List {count} {thing}.",
            "Give me {count} {thing}, each with a short reason.",
            "Write a numbered list of {count} {thing}.",
            "Write {count} tips for people who want to {goal}.",
            "What are {count} things that {role} should know about {topic}?",
            "Make a packing list for a trip to {country}.",
            "Write a step-by-step plan to {goal}. Use {count} steps.",
            "Name {count} advantages and disadvantages of {topic}.",
            "Make a table with {count} facts about {topic} and {topic2}.",
            "Suggest {count} titles for an article about {topic}.",
        ),
    ),
    "stories": (
        0.15,
        (
            "Write a short story about {hero} {setting}.",
            "Tell me a {mood} story about {hero}.",
            "Write the first paragraph of a {mood} story {setting}.",
            "Write a story of {count} sentences about {hero} and a {colour} {object}.",
            "Write a poem about {topic} in four lines.",
            "Write a {mood} dialogue between {hero} and {hero2}.",
            "Describe a {mood} evening {setting}.",
            "Write a bedtime story about {hero} for a child named {name}.",
            "How does the story end? {name} stood {setting} with a {colour} {object} and heard a {animal}.",
            "Write a haiku about {hero}.",
        ),
    ),
    "letters": (
        0.1,
        (
            "Write a short email to {name}: {event} moves to {day}, {time}, because {reason}.",
            "Write an invitation to {event} on {day} at {time} in {city}.",
            "Write a thank-you note to {name} for a {colour} {object}.",
            "Write a complaint about a {object} that broke after {count} days.",
            "Write an advertisement for a {object} that is {quality}.",
            "Write a short bio of {name}, who is {role} in {city} and loves {topic}.",
            "Answer this message kindly: {note}",
            "Write a birthday card for {name}, who is {role}.",
        ),
    ),
    "sums": (
        0.05,
        (
            "What is {a} + {b}?",
            "{name} has {a} {object}s and gives away {small}. How many are left?",
            "A {object} costs {a} euros and a coat {b} euros. What do they cost together?",
            "What is {small} times {small2}? Show the steps.",
            "If a train leaves at {time} and travels for {small} hours, when does it arrive?",
        ),
    ),
}
SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "Answer briefly and clearly.",
    "You are a friendly teacher. Use simple words.",
    "You are a careful editor.",
)
SYSTEM_SHARE = 0.15
_BLANK = re.compile(r"\{(\w+)\}")


def chat(seed: int, index: int) -> dict[str, Any]:
    """The index-th prompt under this seed: {"id", "task", "prompt": [messages]}."""
    rng = random.Random(f"chats/{seed}/{index}")
    kind = rng.choices(list(KINDS), weights=[share for share, _ in KINDS.values()])[0]
    text = _filled(rng.choice(KINDS[kind][1]), rng, {})
    messages = [{"role": "user", "content": text[0].upper() + text[1:]}]
    if rng.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    return {"id": f"chats/{seed}/{index}", "task": kind, "prompt": messages}


def chats(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` prompts of this seed in order, those left out that were there already. Raises ValidationError where there
    are not so many."""
    seen: set[str] = set()
    missed = index = 0
    while len(seen) < count:
        row = chat(seed, index)
        index += 1
        key = json.dumps(row["prompt"])
        if key in seen:
            missed += 1
            if missed > 10 * count + 1000:
                raise ValidationError(
                    f"there are not {count} different prompts; {len(seen)} were found.", param="count"
                )
            continue
        seen.add(key)
        yield row


def _filled(template: str, rng: random.Random, used: dict[str, str]) -> str:
    """The template with its blanks filled; the same blank has the same words, and a 2 after its name others."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in used:
            used[name] = _drawn(name, rng, used)
        return used[name]

    return _BLANK.sub(fill, template)


def _drawn(name: str, rng: random.Random, used: dict[str, str]) -> str:
    kind = name.removesuffix("2")
    makers: Mapping[str, Callable[[], str]] = {
        "note": lambda: _sentence(_filled(rng.choice(NOTES), rng, {})),
        "typos": lambda: _misspelt(_sentence(_filled(rng.choice(NOTES), rng, {})), rng),
        "a": lambda: str(rng.randint(12, 480)),
        "b": lambda: str(rng.randint(12, 480)),
        "small": lambda: str(rng.randint(2, 11)),
    }
    while True:
        found = makers[kind]() if kind in makers else rng.choice(LISTS[kind])
        if kind == name or found != used.get(kind):
            return found


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _misspelt(text: str, rng: random.Random) -> str:
    """Two or three words with letters changed round or left out, and no capital at the beginning."""
    parts = text.split(" ")
    long = [i for i, part in enumerate(parts) if len(part) > 4 and part.isalpha()]
    for i in rng.sample(long, min(len(long), rng.randint(2, 3))):
        at = rng.randrange(1, len(parts[i]) - 2)
        one, two = parts[i][at], parts[i][at + 1]
        parts[i] = parts[i][:at] + rng.choice((two + one, two)) + parts[i][at + 2 :]
    joined = " ".join(parts)
    return joined[0].lower() + joined[1:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.chats", description="Prompts for a chat model, from a generator."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    args = parser.parse_args(argv)
    try:
        header = {"generator": "dfastllm.distill.students.chats", "seed": args.seed}
        write_rows(args.out, chats(args.seed, args.count), header, force=args.force)
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.count} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
