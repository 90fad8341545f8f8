"""Pictures and videos given in two places: once, or refused."""

import itertools

import pytest

from feature_bridge.conversations import parse
from feature_bridge.media import SampleError

A, B = "a.png", "b.png"
TWICE = "images and image, which differ; give one of them"
BOTH = "pictures are given in the turns and in images or image, and they differ; give each of them once"
EMPTY = (None, "", [], [None], [""])


def images(tmp_path, question="Q", *, form="conversations", **columns):
    """The pictures by name, and the types of the first turn's parts."""
    roles, text = (("from", "value"), ("human", "gpt")), question
    if form == "messages":
        roles = (("role", "content"), ("user", "assistant"))
    (role, content), names = roles
    turns = [{role: names[0], content: text}, {role: names[1], content: "A"}]
    conversation = parse({form: turns} | columns, "x:1", tmp_path)
    assert all(image.startswith(str(tmp_path)) for image in conversation.images)
    parts = conversation.messages[0]["content"]
    shape = "" if isinstance(parts, str) else "".join(part["type"][0] for part in parts)
    return [image.removeprefix(f"{tmp_path}/") for image in conversation.images], shape


def inline(*names):
    return [{"type": "image", "image": name} if name else {"type": "image"} for name in names] + [
        {"type": "text", "text": "Q"}
    ]


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_two_columns(form, tmp_path):
    for empty, (one, other) in itertools.product(EMPTY, itertools.permutations(("images", "image"))):
        assert images(tmp_path, form=form, **{one: empty, other: B}) == ([B], "it")
        assert images(tmp_path, form=form, **{one: empty, other: empty}) == ([], "")
    assert images(tmp_path, form=form, images=[A, B], image=A) == ([A, B], "iit")  # the first of them, once more
    assert images(tmp_path, form=form, images=[B], image=f"./{B}") == ([B], "it")
    assert images(tmp_path, form=form, images=[A, A]) == ([A, A], "iit")  # twice in one column is two pictures
    assert images(tmp_path, form=form, images=[A], image=[A, A, B]) == ([A, A, B], "iiit")
    for columns in ({"images": [A], "image": B}, {"images": [A, B], "image": [B, A]}):
        with pytest.raises(SampleError, match=TWICE):
            images(tmp_path, form=form, **columns)


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_parts_and_a_column(form, tmp_path):
    assert images(tmp_path, inline(A), form=form, images=[A]) == ([A], "it")
    assert images(tmp_path, inline(A), form=form, image=f"file://{tmp_path}/{A}") == ([A], "it")
    assert images(tmp_path, inline(A, B), form=form, images=[A, B], image=A) == ([A, B], "iit")
    assert images(tmp_path, inline(A, None), form=form, images=[B]) == ([A, B], "iit")  # the place that is left
    assert images(tmp_path, inline(A, None), form=form, images=[A, B]) == ([A, B], "iit")
    assert images(tmp_path, inline(None, A), form=form, images=[B, A]) == ([B, A], "iit")
    for parts, column in (((A,), [B]), ((A,), [A, B]), ((A, B), [A]), ((A, B), [B, A]), ((A, None), [A])):
        with pytest.raises(SampleError, match=BOTH):
            images(tmp_path, inline(*parts), form=form, images=column)


def test_one_part_that_gives_its_picture_twice(tmp_path):
    part = {"type": "image", "image": A, "image_url": {"url": A}}
    assert images(tmp_path, [part], form="messages") == ([A], "i")
    with pytest.raises(SampleError, match="turn 0 has a picture that is given twice and differs"):
        images(tmp_path, [part | {"path": B}], form="messages")
    with pytest.raises(SampleError, match="turn 0 has a picture with url and path, which differ"):
        images(tmp_path, [{"type": "image", "image": {"url": A, "path": B}}], form="messages")


def test_videos_likewise(tmp_path):
    def videos(parts, **columns):
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
        return parse({"messages": turns} | columns, "x:1", tmp_path).videos

    part = {"type": "video", "video": "v.mp4", "fps": 2}
    (video,) = videos([part], videos=["v.mp4"], video="v.mp4")
    assert (video.source, video.fps) == (f"{tmp_path}/v.mp4", 2.0)
    with pytest.raises(SampleError, match="videos are given in the turns and in videos or video, and they differ"):
        videos([part], videos=["w.mp4"])
    frames = [A, B]
    assert len(videos([{"type": "video", "video": frames}], videos=[frames])) == 1
