"""Profiles: written and read back, bound to their block size, refused otherwise."""

import json

import pytest

from jointkv.errors import BadInput, ModelMismatch
from jointkv.policy.profile import Profile, Target
from tests.core.profiles import MODEL, make_profile


def test_a_profile_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "profile.json"
    profile = make_profile((0.1, 0.3), target=Target(kind="ratio", value=2.0))
    profile.save(path)
    assert Profile.load(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


def test_the_policy_of_a_profile():
    policy = make_profile((0.1, 0.3), scope="chunk").policy()
    assert (policy.max_relative_error, policy.scope, policy.layer_groups) == ((0.1, 0.3), "chunk", 2)
    assert policy.max_token_error == pytest.approx((0.15, 0.45))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "jointkv.profile/2"}', '{"max_relative_error": 0.2}'])
def test_what_is_no_profile(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(BadInput, match="is no profile of jointkv"):
        Profile.load(tmp_path / "p.json")


def test_a_field_too_many_or_out_of_range(tmp_path):
    whole = json.loads(make_profile().model_dump_json())
    for change in ({"surprise": 1}, {"block_size": 0}, {"groups": []}):
        (tmp_path / "p.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(BadInput, match=next(iter(change))):
            Profile.load(tmp_path / "p.json")


def test_a_missing_file_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="cannot read profile"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        make_profile().save(tmp_path / "file" / "p.json")


def test_another_model_and_blocks_of_another_size_are_refused():
    with pytest.raises(ModelMismatch, match="the profile belongs to toy with layers=4"):
        make_profile().check(MODEL.model_copy(update={"layers": 5}), 16)
    with pytest.raises(BadInput, match="--block-size 32"):
        make_profile().check(MODEL, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("kl", "expected kl="), ("speed=2", "expected kl="), ("kl=much", "is not a number"), ("kl=0", "kl must be")),
        *(("kl=-1", "kl must be"), ("ratio=1", "ratio must be"), ("relative_error=1.5", "at most 1")),
        *(("kl=nan", "kl must be"), ("ratio=inf", "ratio must be")),
    ],
)
def test_targets_that_make_no_sense(text, said):
    with pytest.raises(BadInput, match=said):
        Target.parse(text)


def test_a_target():
    assert Target.parse("kl=0.005") == Target(kind="kl", value=0.005)
