"""What of TorchServe's worker is replaced does what TorchServe's own does, on its own classes."""

from __future__ import annotations

import logging
import socket
import threading
import types
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_handler.worker import make_lean, receive

with warnings.catch_warnings():
    # ts/__init__.py reads its version from a file that it leaves open.
    warnings.simplefilter("ignore", ResourceWarning)
    from ts.protocol import otf_message_handler as protocol

THEIRS = protocol._retrieve_buffer
BOTH = pytest.mark.parametrize("function", [receive, THEIRS], ids=["ours", "torchserve's"])


@pytest.fixture
def log_filters():
    """The root logger without filters, which it has again afterwards."""
    root = logging.getLogger()
    before = list(root.filters)
    root.filters.clear()
    yield root
    root.filters[:] = before


def sent(pieces, function, lengths):
    """What `function` receives for each length while another thread sends the pieces."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        def send():
            for piece in pieces:
                theirs.sendall(piece)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return [bytes(function(ours, length)) for length in lengths]
        finally:
            sender.join()


@BOTH
@settings(max_examples=60)
@given(pieces=st.lists(st.binary(max_size=300), max_size=12), data=st.data())
def test_what_is_received_is_what_was_sent_in_pieces_of_any_size(function, pieces, data):
    whole = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    ends = [*cuts, len(whole)]
    lengths = [end - start for start, end in zip([0, *cuts], ends, strict=True)]
    found = sent(pieces, function, lengths)
    assert b"".join(found) == whole
    assert [len(one) for one in found] == lengths


def test_more_than_a_socket_holds_is_received_whole():
    whole = bytes(range(256)) * (5 << 12)  # 5 MiB, many times a socket's buffer
    (found,) = sent([whole[:1], whole[1:1000], whole[1000:]], receive, [len(whole)])
    assert found == whole


def test_a_receive_that_a_signal_interrupts_goes_on():
    # What MSG_WAITALL gives then is less than was asked for; a socket with a timeout does the same without a signal.
    whole = bytes(range(200)) * 1000
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        sender = threading.Thread(target=lambda: [theirs.sendall(whole[at:at + 777]) for at in range(0, 200_000, 777)])
        sender.start()
        assert bytes(receive(ours, len(whole))) == whole
        sender.join()


@BOTH
@pytest.mark.parametrize("had", [b"", b"half"])
def test_the_end_of_the_connection_is_the_end_of_the_process(function, had):
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(had)
        theirs.close()
        with pytest.raises(SystemExit) as ended:
            function(ours, 8)
    assert ended.value.code == 0


def test_it_takes_the_place_of_torchserves_where_that_is_what_we_know(log_filters, monkeypatch):
    monkeypatch.setattr(protocol, "_retrieve_buffer", THEIRS)
    make_lean(protocol)
    assert protocol._retrieve_buffer is receive
    other = types.ModuleType("another version")
    make_lean(other)
    assert not hasattr(other, "_retrieve_buffer")
    make_lean(None)


def test_torchserves_own_messages_are_read_with_it(log_filters, monkeypatch):
    # A load request as Java writes it: the name of the model, its path, batch size, handler, GPU, envelope, image.
    def text(value):
        return len(value).to_bytes(4, "big") + value

    request = (b"L" + text(b"toy") + text(b"/models/toy") + (8).to_bytes(4, "big") + text(b"entry.py")
               + (0xFFFFFFFF).to_bytes(4, "big") + text(b"") + b"\0")
    read = []
    for function in (THEIRS, receive):
        monkeypatch.setattr(protocol, "_retrieve_buffer", function)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(request)
            command, message = protocol.retrieve_msg(ours)
            read.append((bytes(command), {key: bytes(value) if isinstance(value, bytearray) else value
                                          for key, value in message.items()}))
    assert read[0] == read[1]
    assert read[1][1]["modelName"] == b"toy"


def test_only_the_line_for_each_server_batch_is_dropped(log_filters):
    root, seen = log_filters, []

    class Keeper(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    keeper, level = Keeper(), root.level
    root.addHandler(keeper)
    root.setLevel(logging.INFO)
    try:
        logging.info("Backend received inference at: %d", 1)  # noqa: LOG015 - as TorchServe does
        make_lean(types.ModuleType("another version"))
        logging.info("Backend received inference at: %d", 2)  # noqa: LOG015 - as TorchServe does
        logging.info("Listening on port: %s", 3)  # noqa: LOG015 - as TorchServe does
        logging.getLogger("batch_handler").info("Backend received inference at: another logger's")
    finally:
        root.removeHandler(keeper)
        root.setLevel(level)
    assert [line for line in seen if "another logger's" not in line] == [
        "Backend received inference at: 1", "Listening on port: 3"]
