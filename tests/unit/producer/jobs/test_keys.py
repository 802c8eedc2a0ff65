"""What a key looks like."""

import string

from producer.jobs.keys import ALPHABET, Keys, digest, new_key, well_formed
from producer.jobs.postgres import Database


def test_a_new_key_is_well_formed_and_no_other_one() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    for key in made:
        assert key.startswith("ovis_")
        assert len(key) == len("ovis_") + 32 + 6
        assert set(key[5:]) <= set(string.ascii_letters + string.digits)
        assert well_formed(key)


def test_one_wrong_character_is_seen_wherever_it_is() -> None:
    key = new_key()
    for place, character in enumerate(key):
        for other in (ALPHABET[(ALPHABET.find(character) + 1) % len(ALPHABET)], "é", " "):
            assert not well_formed(key[:place] + other + key[place + 1 :]), place
    for cut in ("", "ovis_", key[:-1], key[1:], key + "0", key.upper(), f" {key}"):
        assert not well_formed(cut)


def test_what_is_no_key_is_refused_without_asking_postgres() -> None:
    nowhere = Database.at("postgresql://nobody:wrong@127.0.0.1:1/none")
    key = new_key()
    assert Keys(nowhere).find(key[:-1] + ALPHABET[ALPHABET.find(key[-1]) - 1]) is None


def test_the_digest_is_sha_256() -> None:
    assert digest("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
