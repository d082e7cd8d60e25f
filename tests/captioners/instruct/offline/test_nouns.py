"""Words of captions and labels."""

import pytest

from captioners.instruct.offline import nouns


@pytest.mark.parametrize(
    ("label", "one", "many", "a"),
    [
        ("person", "person", "people", "a person"),
        ("tv", "TV", "TVs", "a TV"),
        ("dining table", "table", "tables", "a table"),
        ("sports ball", "ball", "balls", "a ball"),
        ("knife", "knife", "knives", "a knife"),
        ("sheep", "sheep", "sheep", "a sheep"),
        ("orange", "orange", "oranges", "an orange"),
        ("umbrella", "umbrella", "umbrellas", "an umbrella"),
        ("scissors", "scissors", "scissors", "a pair of scissors"),
        ("skis", "skis", "skis", "a pair of skis"),
        ("broccoli", "broccoli", "broccoli", "some broccoli"),
        ("large orange cross", "large orange cross", "large orange crosses", "a large orange cross"),
    ],
)
def test_what_things_are_called(label, one, many, a):
    noun = nouns.noun(label)
    assert (noun.one, noun.many, noun.a()) == (one, many, a)


def test_every_label_of_coco_has_a_name_a_plural_and_near_words():
    assert len(nouns.COCO) == 80
    book = nouns.lexicon()
    for label in nouns.COCO:
        noun = nouns.noun(label)
        assert noun.one and noun.many and book.keys[label] == label
        assert label in book.near[label]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("sofas", "couch"), ("polar bear", "bear"), ("women", "person"), ("skate board", "skateboard"),
        ("office chair", "chair"), ("firefighter", "person"), ("desk", "desk"), ("plate", "plate"),
    ],
)  # fmt: skip
def test_words_that_mean_the_same(word, key):
    assert nouns.lexicon().keys[word] == key


def test_articles():
    assert [nouns.article(word) for word in ("hour", "unicorn", "apple", "one", "umbrella")] == [
        "an",
        "a",
        "an",
        "a",
        "an",
    ]


def test_labels_taken_apart():
    assert nouns.described("large red circle") == nouns.Described("large", "red", "circle")
    assert nouns.described("orange") == nouns.Described(None, None, "orange")
    assert nouns.described("potted plant") == nouns.Described(None, None, "potted plant")


def test_a_wine_glass_is_a_cup_and_no_cup_a_wine_glass():
    assert nouns.includes("cup", "wine glass") and not nouns.includes("wine glass", "cup")
