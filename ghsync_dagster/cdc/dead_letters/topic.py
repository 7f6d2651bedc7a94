"""The topic of dead letters, read back.

Belongs here: reading whole letters. Not here: writing them, which a consumer does (``cdc.stream.letters``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghsync_dagster.cdc.dead_letters.record import DeadLetter, parse
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ghsync_dagster.domain.letters import Letter
    from ghsync_dagster.stores.kafka.client import KafkaSettings

log = get_logger("dead_letters")


def dead_letter_ends(kafka: KafkaSettings) -> dict[int, int]:
    """Return the end of each partition of the topic now.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka.topics import ranges_of

    return {partition: end for partition, (_, end) in ranges_of(kafka, kafka.dead_letter_topic).items()}


def read_dead_letters(kafka: KafkaSettings, since: Mapping[int, int] | None = None) -> Iterator[DeadLetter]:
    """Yield the dead letters that there are now, oldest first; of those of one record only the first.

    Args:
        kafka: The topic of changes and the way to the brokers.
        since: Only those from these offsets on, by partition, as ``dead_letter_ends`` returned them earlier.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka.topics import read_to_end

    seen: set[str] = set()
    foreign = 0
    for message in read_to_end(kafka, kafka.dead_letter_topic, since):
        letter = parse(message)
        if letter is None:
            foreign += 1
        elif letter.id not in seen:
            seen.add(letter.id)
            yield letter
    if foreign:
        log.warning("foreign records in the dead-letter topic", topic=kafka.dead_letter_topic, records=foreign)


def whole_letter(kafka: KafkaSettings, letter: Letter) -> DeadLetter | None:
    """Read the record of a letter; None where the topic of dead letters no longer holds it.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka.topics import ranges_of, read_ranges

    topic = f"{letter.topic}{kafka.dead_letter_topic.removeprefix(kafka.topic)}"
    partition, offset = letter.place
    low, high = ranges_of(kafka, topic).get(partition, (0, 0))
    if not low <= offset < high:
        return None
    found = [parse(message) for message in read_ranges(kafka, topic, {partition: (offset, offset + 1)})]
    return next((whole for whole in found if whole is not None and whole.id == letter.id), None)
