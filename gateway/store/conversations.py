"""Conversations of the playground: whose they are, and their turns."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import Conflict, NotFound
from gateway.store.tables import conversation_messages, conversations
from gateway.values.assembly import Message


def turns(
    connection: Connection, conversation_id: str, user_id: str, limit: int
) -> tuple[Message, ...]:
    """The last `limit` turns of the user's conversation, oldest first; none for a new one.

    Raises NotFound for one that belongs to someone else: whether it exists is not told.
    """
    owner = connection.scalar(
        select(conversations.c.user_id).where(conversations.c.id == conversation_id)
    )
    if owner is None:
        return ()
    if owner != user_id:
        raise NotFound("there is no such conversation of yours; a new id begins a new one")
    rows = connection.execute(
        select(conversation_messages.c.role, conversation_messages.c.content)
        .where(conversation_messages.c.conversation_id == conversation_id)
        .order_by(conversation_messages.c.id.desc())
        .limit(limit)
    )
    return tuple(reversed([Message(row.role, row.content) for row in rows]))


def append(
    connection: Connection,
    conversation_id: str,
    user_id: str,
    character_id: str | None,
    said: str,
    answered: str,
    request_id: str,
    now: datetime,
) -> None:
    """Keep a turn and its answer; the conversation begins with its first.

    Raises Conflict when someone else began one with this id meanwhile.
    """
    values = {"user_id": user_id, "character_id": character_id, "updated_at": now}
    asked = select(conversations.c.user_id).where(conversations.c.id == conversation_id)
    owner = connection.scalar(asked)
    if owner is None:
        begun = insert(conversations).values(id=conversation_id, created_at=now, **values)
        try:
            with connection.begin_nested():
                connection.execute(begun)
            owner = user_id
        except IntegrityError:  # two first turns at once: the other one began it
            owner = connection.scalar(asked)
    if owner != user_id:
        raise Conflict("this conversation id is taken; use another one")
    connection.execute(
        update(conversations).where(conversations.c.id == conversation_id).values(updated_at=now)
    )
    connection.execute(
        insert(conversation_messages),
        [
            {
                "conversation_id": conversation_id,
                "role": role,
                "content": content,
                "request_id": request_id,
                "created_at": now,
            }
            for role, content in (("user", said), ("assistant", answered))
        ],
    )
