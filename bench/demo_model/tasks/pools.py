"""Word pools the task generators draw from. Plain data, no logic."""

NAMES: tuple[str, ...] = tuple(
    """Ada Ben Cleo Dan Elsa Finn Grace Hugo Iris Jonas Kira Leo Maya Nora Omar Paula Quinn Rosa
    Sam Tara Uma Victor Wanda Xenia Yusuf Zoe Alma Boris Clara Dario Emil Fatima Gina Hanna Ivan
    Julia Karim Lena Milo Nina Oskar Priya Rafael Sofia Theo Vera Wim Amir Bella Carlos Diana
    Erik Flora Greta Henry Ines Jack Lucia Marco Noah Olga Peter""".split()
)

SURNAMES: tuple[str, ...] = tuple(
    """Adler Becker Costa Duarte Evans Fischer Garcia Hansen Ito Jensen Kowalski Lopez Meyer
    Novak Olsen Petrov Rossi Silva Tanaka Weber Young Zimmer Baker Carter Dubois Fuchs Klein
    Moreau Parker Sato""".split()
)

# singular, plural
ITEMS: tuple[tuple[str, str], ...] = tuple(
    (s, s + "s")
    for s in """apple book button candle card coin cookie egg flower lemon marble muffin orange
    pebble pen pencil plate postcard ribbon shell stamp sticker ticket tile toy tulip balloon
    bead bottle brick""".split()
)

GOODS: tuple[tuple[str, str], ...] = tuple(
    (s, s + "s")
    for s in """notebook lamp mug scarf ball kite puzzle hammer basket pillow blanket poster
    backpack eraser folder plant bowl clock chair jar towel hat belt shirt cable phone""".split()
)

# singular, plural of containers
PACKS: tuple[tuple[str, str], ...] = (
    ("box", "boxes"),
    ("bag", "bags"),
    ("pack", "packs"),
    ("crate", "crates"),
    ("tray", "trays"),
)

CITIES: tuple[str, ...] = tuple(
    """Athens Berlin Cairo Dublin Lisbon Geneva Hamburg Istanbul Jakarta Krakow Lima Madrid
    Nairobi Oslo Paris Quito Rome Seoul Tokyo Vienna Warsaw Zurich Boston Chicago Denver Kyoto
    Lyon Milan Porto Turin""".split()
)

JOBS: tuple[str, ...] = tuple(
    """baker nurse teacher engineer pilot farmer painter lawyer chemist gardener writer driver
    plumber dentist carpenter architect librarian musician waiter tailor""".split()
)

WORDS: tuple[str, ...] = tuple(
    """acorn badge cabin daisy eagle fable gecko honey igloo jewel koala ladder maple needle
    ocean panda quartz rabbit salmon tiger umbrella violin walnut yacht zebra anchor bridge
    cactus donkey engine forest guitar hammer island jacket kettle lantern magnet napkin olive
    pepper quilt rocket saddle temple unicorn valley window yogurt zipper arrow basil camel
    desert elbow feather garlic harbor ink jungle kiwi lizard mango nectar otter parrot queen
    river spider turtle urn velvet whale""".split()
)

TITLES: tuple[str, ...] = tuple(
    """concert lecture workshop picnic meeting dinner seminar exhibition rehearsal tournament
    interview festival""".split()
)

PLACES: tuple[str, ...] = tuple(
    """library museum theatre stadium garden gallery school station castle harbor market
    hotel""".split()
)

MONTHS: tuple[str, ...] = tuple(
    """January February March April May June July August September October November
    December""".split()
)

WEEKDAYS: tuple[str, ...] = tuple(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
)
