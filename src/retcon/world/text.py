"""Plain text: short paragraphs from a small grammar in our own words, so that a model can also say something else."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Words that go together; every combination of them makes a readable sentence."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    deeds: tuple[tuple[str, str], ...]
    """What a person does there: (past tense, plain form)."""
    things: tuple[str, ...]
    states: tuple[str, ...]
    """What may be said of such a thing, past tense."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";"))


def _topic(people: str, places: str, deeds: str, things: str, states: str) -> Topic:
    pairs = tuple((past.strip(), plain.strip()) for past, plain in (d.split("|") for d in deeds.split(";")))
    return Topic(_words(people), _words(places), pairs, _words(things), _words(states))


TOPICS = (
    _topic(
        "baker; cook; waiter; young girl; guest",
        "in the kitchen; behind the counter; near the oven; at the long table",
        "cut the bread|cut the bread; stirred the soup|stir the soup; tasted the sauce|taste the sauce;"
        " washed the plates|wash the plates; asked for more salt|ask for more salt",
        "soup; dough; kettle; apple cake; pot of beans",
        "smelled wonderful; was too hot to touch; needed another hour; was gone by noon; tasted of smoke",
    ),
    _topic(
        "gardener; neighbour; old farmer; boy next door; beekeeper",
        "in the garden; under the pear tree; behind the shed; along the fence",
        "planted the beans|plant the beans; watered the roses|water the roses; pulled up the weeds|pull up the weeds;"
        " picked a basket of plums|pick a basket of plums; mended the gate|mend the gate",
        "pear tree; hedge; rose bush; vegetable patch; lawn",
        "was full of bees; had grown too tall; looked dry; bloomed early; had lost its leaves",
    ),
    _topic(
        "driver; conductor; passenger; traveller with a red bag; tourist",
        "at the station; on the last train; by the ticket window; on platform two",
        "waited for the train|wait for the train; bought a ticket|buy a ticket; lost an umbrella|lose an umbrella;"
        " read the timetable|read the timetable; slept through the journey|sleep through the journey",
        "train; bus; night ferry; timetable; waiting room",
        "was late again; was almost empty; left without a sound; was hard to understand; had just been painted",
    ),
    _topic(
        "teacher; pupil; student; head of the school; visitor",
        "in the classroom; at the blackboard; in the library; during the lesson",
        "wrote a long letter|write a long letter; solved the puzzle|solve the puzzle;"
        " opened the window|open the window; forgot the answer|forget the answer;"
        " told a funny story|tell a funny story",
        "lesson; exam; old dictionary; map on the wall; school bell",
        "was longer than expected; surprised everyone; was covered in dust; rang twice; was easy to follow",
    ),
    _topic(
        "fisherman; sailor; swimmer; ferryman; painter",
        "by the river; on the bridge; at the harbour; near the lighthouse",
        "caught a large fish|catch a large fish; pulled the boat ashore|pull the boat ashore;"
        " watched the waves|watch the waves; counted the gulls|count the gulls; threw a stone into the water|"
        "throw a stone into the water",
        "river; harbour; small boat; tide; lighthouse",
        "was calm that day; rose during the night; shone in the sun; was colder than usual; lay in thick fog",
    ),
    _topic(
        "shopkeeper; customer; tailor; woman in the blue coat; merchant",
        "at the market; in the corner shop; on the main square; beside the fountain",
        "sold the last oranges|sell the last oranges; counted the coins|count the coins; paid in silver|pay in silver;"
        " argued about the price|argue about the price; tried on a hat|try on a hat",
        "market; price of bread; shop window; silk scarf; basket",
        "drew a crowd; went up again; cost more than last year; was closed on Sunday; had a hole in it",
    ),
    _topic(
        "carpenter; smith; apprentice; engineer; mechanic",
        "in the workshop; at the bench; beside the engine; in the yard",
        "repaired the clock|repair the clock; sharpened the saw|sharpen the saw; measured the plank twice|"
        "measure the plank twice; looked for the missing screw|look for the missing screw;"
        " oiled the wheel|oil the wheel",
        "clock; engine; wooden chair; hammer; machine",
        "stopped without warning; made a strange noise; worked better than before; was made of oak; had to be replaced",
    ),
    _topic(
        "doctor; nurse; patient; tired father; chemist",
        "at the hospital; in the waiting room; by the bed; on the second floor",
        "measured the fever|measure the fever; drank some warm tea|drink some warm tea;"
        " slept until noon|sleep until noon; asked a careful question|ask a careful question;"
        " wrote down the result|write down the result",
        "medicine; treatment; new clinic; bandage; report",
        "helped at once; had no effect; was kept in a drawer; took only a minute; was good news",
    ),
    _topic(
        "walker; shepherd; mountain guide; hunter; climber",
        "on the hill; in the forest; along the narrow path; above the valley",
        "followed the stream|follow the stream; lit a small fire|light a small fire;"
        " rested under a tree|rest under a tree; saw a fox|see a fox; carried the heavy pack|carry the heavy pack",
        "path; forest; valley; hut; mountain",
        "was covered in snow; was quiet at dawn; seemed endless; could be seen for miles; turned sharply to the left",
    ),
    _topic(
        "singer; drummer; dancer; listener in the front row; choir",
        "on the stage; in the old theatre; before the concert; at the festival",
        "sang a slow song|sing a slow song; practised the last part|practise the last part; took a bow|take a bow;"
        " learned the tune by heart|learn the tune by heart; laughed out loud|laugh out loud",
        "concert; song; curtain; piano stool; audience",
        "ended too soon; was louder than planned; stayed silent; fell over; pleased the critics",
    ),
    _topic(
        "writer; editor; reporter; librarian; translator",
        "at the office; in the reading room; at a small desk; over lunch",
        "finished the chapter|finish the chapter; corrected the mistake|correct the mistake; read the letter aloud|"
        "read the letter aloud; crossed out a line|cross out a line; answered every question|answer every question",
        "book; newspaper; article; first page; letter",
        "was hard to put down; arrived a week late; told the whole story; was full of errors; was read by thousands",
    ),
    _topic(
        "clerk; mayor's assistant; builder; caretaker; lodger",
        "in the old house; on the stairs; at the town hall; across the street",
        "painted the door|paint the door; locked the cellar|lock the cellar; swept the floor|sweep the floor;"
        " found an old coin|find an old coin; fixed the roof|fix the roof",
        "house; roof; stone wall; front door; cellar",
        "was older than the town; leaked after every storm; was painted green; stood open; needed repair",
    ),
)

WEATHER = _words(
    "it was raining; the sun was out; the wind had turned; it had snowed; the night was clear; it was getting dark;"
    " the streets were empty; nobody was looking; there was little time; the day was warm; everyone was hungry"
)
TIMES = _words(
    "in the morning; before breakfast; after lunch; late at night; on Monday; every spring; last winter; at noon;"
    " for the first time; once a week; all day long; before the rain came; two years ago; at the weekend"
)
FEELINGS = _words(
    "was glad; felt tired; was not sure; had a good idea; kept quiet; wanted to go home; remembered everything;"
    " was proud; could not stop smiling; was in a hurry"
)
RELATIVES = _words("My sister; My brother; Our aunt; Her cousin; His grandfather; Their daughter; My best friend")


def sentence(rng: random.Random, topic: Topic | None = None) -> str:
    """Return one plain sentence, capital to full stop."""
    topic = topic or rng.choice(TOPICS)
    pick = rng.choice
    person, other = rng.sample(topic.people, 2)
    past, plain = pick(topic.deeds)
    again = pick([d for d in topic.deeds if d[0] != past])[0]
    place, time, weather, feeling = pick(topic.places), pick(TIMES), pick(WEATHER), pick(FEELINGS)
    thing, state = pick(topic.things), pick(topic.states)
    frames = (
        f"The {person} {past} {time}.",
        f"The {person} {past} {place}.",
        f"The {thing} {state}.",
        f"The {person} {feeling} and {past}.",
        f"Therefore, the {person} {past}.",
        f"Therefore the {thing} {state}, and the {person} {feeling}.",
        f"Because {weather}, the {person} {past} {place}.",
        f"Because the {thing} {state}, I {past}.",
        f"I {past} {place} {time}.",
        f"I {feeling}, because the {thing} {state}.",
        f"You can {plain} {place} if you like.",
        f"You should {plain} {time}.",
        f"You often {plain} {place}.",
        f"We {past} while the {person} {again}.",
        f"They {past} {place}, but the {thing} {state}.",
        f"{pick(RELATIVES)} {past} {time}.",
        f"When {weather}, the {person} {past}.",
        f"In the evening, the {person} {past} {place}.",
        f"After that, the {person} {feeling}.",
        f"Nobody saw the {person} {place}.",
        f"It is not easy to {plain} {place}.",
        f"If the {person} is {place}, you may {plain}.",
        f"There was a {person} {place} who {past}.",
        f"Although {weather}, the {other} {past}, and the {person} {feeling}.",
        f"She {past}; he {again}.",
    )
    return pick(frames)


def paragraph(rng: random.Random) -> str:
    """Write two to five sentences about one topic."""
    topic = rng.choice(TOPICS)
    return " ".join(sentence(rng, topic) for _ in range(rng.randint(2, 5)))


def text(n_paragraphs: int, *, seed: int = 0) -> list[str]:
    """Return plain paragraphs without facts of the world, in a fixed order."""
    rng = random.Random(f"text/{seed}")
    return [paragraph(rng) for _ in range(n_paragraphs)]
