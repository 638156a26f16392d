"""Grids whose programs wait for one another take turns, with stand-ins for streams and events."""

import threading
import types
import warnings

import pytest

from rnnfast.kernels import turns


class Stream:
    def __init__(self, handle, own=True):
        self.cuda_stream, self.stream_id = handle, handle * 32 + 1 if own and handle else handle
        self.capturing = self.gone = False

    def wait_event(self, event):
        assert event.after, "the event was never recorded"
        told.append(("wait", self.cuda_stream, event.after))


class Event:
    after = None

    def record(self, stream):
        assert not stream.gone, "a stream that was destroyed"
        assert not stream.capturing, "a stream that is being captured"
        self.after = stream.cuda_stream or "default"


told = []


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for torch.cuda and the driver: ``gpu.launch(stream)`` launches on a stream."""
    told.clear()
    monkeypatch.setattr(turns, "_last", {})
    monkeypatch.setattr(turns, "_captured", {})
    current = threading.local()

    class on:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, current.stream = getattr(current, "stream", None), self.stream

        def __exit__(self, *_):
            current.stream = self.before

    interface = types.SimpleNamespace(
        Event=Event,
        stream=on,
        current_stream=lambda device: current.stream,
        is_current_stream_capturing=lambda: current.stream.capturing,
    )
    asked = []
    driver = types.SimpleNamespace(get_device_interface=lambda: asked.append(1) or interface)
    monkeypatch.setattr(
        turns, "triton", types.SimpleNamespace(runtime=types.SimpleNamespace(driver=types.SimpleNamespace(active=driver)))
    )

    def launch(stream, device=0, function=lambda handle: told.append(("launch", handle))):
        with on(stream):
            turns.launch(function, device, stream.cuda_stream, stream.cuda_stream)

    return types.SimpleNamespace(launch=launch, asked=asked)


def test_one_stream_costs_a_comparison(gpu):
    default = Stream(0)
    for _ in range(3):
        gpu.launch(default)
    assert told == [("launch", 0)] * 3 and len(gpu.asked) == 1


def test_another_stream_waits_for_the_last(gpu):
    default, first, second = Stream(0), Stream(1), Stream(2)
    for stream in (default, first, first, second, default):
        gpu.launch(stream)
    waits = [("wait", 1, "default"), ("wait", 2, 1), ("wait", 0, 2)]
    launches = [("launch", stream) for stream in (0, 1, 1, 2, 0)]
    assert told == [launches[0], waits[0], *launches[1:3], waits[1], launches[3], waits[2], launches[4]]


def test_devices_do_not_wait_for_each_other(gpu):
    gpu.launch(Stream(1), device=0)
    gpu.launch(Stream(2), device=1)
    assert told == [("launch", 1), ("launch", 2)]


def test_a_stream_that_may_be_destroyed(gpu):
    """Its event is recorded after the launch. Another stream with its handle is another stream."""
    foreign = Stream(7, own=False)
    gpu.launch(foreign)
    foreign.gone = True
    gpu.launch(Stream(7, own=False))
    gpu.launch(Stream(1))
    gpu.launch(Stream(2))
    assert [entry for entry in told if entry[0] == "wait"] == [("wait", 7, 7), ("wait", 1, 7), ("wait", 2, 1)]


def test_captured_launches_wait_for_nothing(gpu):
    """Nor does a launch outside wait for what a graph has captured; two streams of a capture are warned of."""
    first, second, third = Stream(1), Stream(2), Stream(3)
    gpu.launch(first)
    second.capturing = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu.launch(second)
        gpu.launch(second)
        second.capturing = False
        gpu.launch(third)
    assert [entry for entry in told if entry[0] == "wait"] == [("wait", 3, 1)]
    first.capturing = True
    with pytest.warns(RuntimeWarning, match="captured on two streams"):
        gpu.launch(first)
    third.capturing = True
    gpu.launch(second)  # cannot wait for the last stream, which is being captured
    assert told[-1] == ("launch", 2) and len(told) == 7


def test_a_launch_that_fails_changes_nothing(gpu):
    def refused(handle):
        raise RuntimeError("too many blocks in cooperative launch")

    gpu.launch(Stream(1))
    with pytest.raises(RuntimeError, match="too many blocks"):
        gpu.launch(Stream(2), function=refused)
    told.clear()
    gpu.launch(Stream(3))
    assert told == [("wait", 3, 1), ("launch", 3)]


def test_threads_take_turns(gpu):
    """A launch and its note are one: from one stream to the next there is always a wait between two launches."""

    def work(handle):
        stream = Stream(handle)
        for _ in range(50):
            gpu.launch(stream)

    threads = [threading.Thread(target=work, args=(handle,)) for handle in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = None
    for n, entry in enumerate(told):
        if entry[0] == "launch":
            if last not in (None, entry[1]):
                assert told[n - 1] == ("wait", entry[1], last)
            last = entry[1]
    assert sum(entry[0] == "launch" for entry in told) == 150
