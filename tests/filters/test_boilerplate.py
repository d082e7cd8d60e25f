from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.boilerplate import boilerplate

SAYS_NOTHING = {
    "file_name": [
        "IMG_2034.jpg",
        "IMG_2034",
        "DSC00123",
        "dsc_0294.JPG",
        "P1010023",
        "Screenshot 2019-04-02 at 10.23.11 PM",
        "Screen Shot 2015-09-01 at 3.12.45 pm.png",
        "Screenshot_20190402-102311",
        "WhatsApp Image 2020-01-12 at 10.11.12.jpeg",
        "PXL_20210912_143012345.jpg",
        "image (3)",
        "unnamed (1)",
        "Untitled-1",
        "download (3).jpg",
        "spacer.gif",
        "stainedglass22B.JPG",
        "garden gate.png",
        "Name: DSC_1170.jpg",
    ],
    "generic": [
        "image",
        "Image of",
        "Photo",
        "logo",
        "thumbnail",
        "untitled",
        "Click here",
        "click to enlarge",
        "Read more",
        "no image available",
        "Sorry, no image available yet",
        "Image not found",
        "placeholder",
        "Image 3 of 10",
        "product image",
        "stock photo",
        "View larger image",
        "alt text",
        "image description",
        "Featured image",
        "profile picture",
        "cover photo",
        "slide background",
    ],
    "url": [
        "https://example.com/a/b.jpg",
        "www.example.com",
        "someblog.org",
        "info@example.com",
        "ToolShed.net Home",
        "http://www.example.com/patterns/how-to-knit-a-hat.html",
    ],
    "number_only": ["12345", "0.3289374709", "$19.99", "12/05/2019", "20190824_071455"],
    "date_only": ["May 5, 2013", "3rd of June 2011", "Tue 12 Sep 2017"],
    "markup": ['<img src="a.jpg" alt="">', "<br>", "{{ product.title }}", '[caption id="attachment_12" align="left"]'],
    "hash": ["d41d8cd98f00b204e9800998ecf8427e", "550e8400-e29b-41d4-a716-446655440000", "a8Fk3jKl9mNpQr72"],
    "code": ["SIL-67", "DS-2CD2042WD-I", "TN-213 203/253"],
}

DESCRIBES = [
    "Image of a red car",
    "Image of: Wooden Coffee Tables",
    "Photo by Jane Smith",
    "A logo of a coffee shop",
    "Sunrise Bakery Logo",
    "New home for sale in Austin",
    "Red car",
    "iPhone 12 case",
    "Chicago in May 2013",
    "2013 Ford Fiesta",
    "Icon of Saint Nicholas",
    "Background with red brick wall",
    "Product photography of a watch",
    "Picture frame in gold",
    "Screenshot of a puzzle game",
    "Slide guitar player",
    "Figure skating",
    "May Day parade",
    "3D printer",
    "File cabinet",
    "Arrow pointing left at a tree",
    "5 <3 hearts",
    "price < $10 shoes",
    "linen-rentals-in-los-angeles",
    "county-fair-wedding-photographer-034",
    "lake_trout_charter_boat_photo.jpg",
    "Evergreen_Fleece_Joggers_Blue.jpg",
    "Free Stock Photo: Illustration of a warning sign",
    "Red barn in snow | example.com",
    "Купить красный автомобиль",
    "赤い車の写真",
]


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in SAYS_NOTHING.items() for text in texts])
def test_texts_that_say_nothing_match_their_rule(rule: str, text: str) -> None:
    assert boilerplate(text) == rule


@pytest.mark.parametrize("text", DESCRIBES)
def test_texts_that_describe_match_no_rule(text: str) -> None:
    assert boilerplate(text) is None


@given(st.text(max_size=60))
def test_any_text_is_judged_and_the_same_each_time(text: str) -> None:
    assert boilerplate(text) == boilerplate(text)


@pytest.mark.parametrize(
    "text",
    ["1" * 999 + "x", "a." * 499, "img 1" + " 1" * 480 + "q", "<" * 999, "{{" * 499, "a@" * 499, "-_" * 490 + "k"],
)
def test_no_text_makes_a_pattern_run_away(text: str) -> None:
    start = time.process_time()
    boilerplate(text)
    assert time.process_time() - start < 0.5
