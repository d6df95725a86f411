"""What a user may have meant."""

from jointkv.system.nearest import nearest, not_known

KNOWN = ("near_prefix", "names", "unrelated")


def test_the_nearest_name() -> None:
    assert nearest("Near-Prefix", KNOWN) == "near_prefix" and nearest("nam", KNOWN) == "names"
    assert nearest("poems", KNOWN) is None and nearest("", KNOWN) is None and nearest("x", ()) is None


def test_a_message_names_the_nearest_and_all() -> None:
    assert not_known("unrelate", KNOWN, ", more") == (
        "'unrelate'; did you mean 'unrelated'? Known: near_prefix, names, unrelated, more"
    )
    assert not_known("poems", iter(KNOWN)) == "'poems'; known: near_prefix, names, unrelated"
