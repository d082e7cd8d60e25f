"""Alt texts of the web that describe no picture of shapes: boilerplate, foreign sentences, texts too short.

Used by `web` for its rows and by training as texts that are never true. Everything is written here by hand or drawn
by a seeded generator.
"""

from __future__ import annotations

import random

_FOREIGN: tuple[str, ...] = (
    "Ein Hund läuft über die grüne Wiese hinter dem Haus.",
    "Die alte Brücke über den Fluss im Morgennebel",
    "Zwei Kinder spielen mit einem Ball am Strand",
    "Unser neues Angebot für Küchen und Bäder",
    "Blick vom Balkon auf die verschneiten Berge",
    "Frisches Brot und Käse auf einem Holztisch",
    "Der Zug fährt am späten Abend in den Bahnhof ein",
    "Rote Äpfel hängen an einem alten Baum im Garten",
    "Une femme lit un livre dans le parc au printemps",
    "Le petit chat dort sur le canapé du salon",
    "Vue de la tour depuis le pont au coucher du soleil",
    "Des tomates fraîches au marché du dimanche matin",
    "La maison blanche près de la mer en Bretagne",
    "Un vieux vélo appuyé contre un mur de pierre",
    "Recette de tarte aux pommes de ma grand-mère",
    "Les enfants jouent dans la neige devant l'école",
    "Un perro marrón corre por la playa al atardecer",
    "La plaza mayor de la ciudad en un día de lluvia",
    "Dos niñas comen helado en la terraza del café",
    "El mercado de flores abre los sábados por la mañana",
    "Casa de campo con jardín y piscina en venta",
    "Un plato de arroz con verduras y pollo asado",
    "Las montañas nevadas vistas desde el valle",
    "El tren de la costa pasa junto a los acantilados",
    "Собака бежит по зелёной траве рядом с домом",
    "Старый мост через реку в утреннем тумане",
    "Дети играют в снегу возле школы",
    "Вид на город с высокой башни вечером",
    "Свежий хлеб и сыр на деревянном столе",
    "Красные яблоки висят на дереве в саду",
    "Новая коллекция зимней одежды уже в продаже",
    "Поезд медленно подходит к станции",
    "一只小狗在草地上奔跑",
    "傍晚的海边有两个孩子在玩球",
    "老城区的石桥和清晨的薄雾",
    "桌子上放着新鲜的面包和奶酪",
    "妈妈在厨房里做晚饭",
    "从山顶看到的城市夜景",
    "花园里的苹果树结满了红色的果实",
    "这家餐厅的招牌菜是红烧牛肉面",
)

_PHRASES: tuple[str, ...] = (
    "image of", "photo of", "picture of the day", "logo", "company logo", "our logo", "click here",
    "click to enlarge", "read more", "download now", "placeholder image", "image not found",
    "no image available", "untitled image", "default thumbnail", "banner image", "header image",
    "product image", "profile picture", "user avatar", "share on facebook", "add to cart",
    "buy now with free shipping", "all rights reserved", "photo by our staff", "stock photo",
    "image 1 of 5", "view larger image", "menu icon", "search icon", "arrow icon", "loading please wait",
    "advertisement", "skip to content", "best price online", "new arrivals this week", "sale up to 50% off",
    "sign up for our newsletter", "cover photo", "screenshot of the page", "thumbnail", "slide 3",
    "gallery image 12", "home page", "back to top",
)  # fmt: skip

_SHORT: tuple[str, ...] = (
    "red", "a", "shape", "circle", "pic", "blue", "img", "art", "a star", "ring", "the", "two", "photo",
    "square", "1", "x", "alt", "ok", "new", "it", "dot", "on", "top", "of", "a b", "green", "n/a", "tbd",
    "-", "...",
)  # fmt: skip

_CAMERA: tuple[str, ...] = (
    "IMG_{:04d}.jpg",
    "DSC{:05d}.JPG",
    "DSCN{:04d}.jpg",
    "P10{:05d}.jpg",
    "image{:03d}.png",
    "photo-{:04d}-scaled.jpg",
)
_CAMERA += ("screenshot_{:06d}.png", "{:08d}_n.jpg", "banner-{:d}x90.gif", "untitled-{:d}.jpg")


def foreign(rng: random.Random) -> str:
    """A sentence in German, French, Spanish, Russian or Chinese."""
    return rng.choice(_FOREIGN)


def boilerplate(rng: random.Random) -> str:
    """A file name or a phrase that templates put in every alt text."""
    if rng.random() < 0.45:
        return rng.choice(_CAMERA).format(rng.randint(1, 9999))
    return rng.choice(_PHRASES)


def too_short(rng: random.Random) -> str:
    """A text of fewer than three words and no more than six characters."""
    return rng.choice(_SHORT)


def scrambled(rng: random.Random) -> str:
    """Random lower-case words: the shape of a text without its meaning."""
    return " ".join(
        "".join(rng.choice("aeioubcdfghklmnprstvw") for _ in range(rng.randint(2, 8))) for _ in range(rng.randint(2, 7))
    )
