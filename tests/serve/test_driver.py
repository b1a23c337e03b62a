"""The driver's thread: turns, cancellation, limits, and an engine that fails."""

import asyncio
import dataclasses
import random
import threading

import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request, Sampling
from lora_jax.serve.driver import Closed, Driver, Full, Job
from lora_jax.serve.turns import Turns

from ..engines import complete
from ..families import FAMILIES, random_model
from .adapters import answer, ask, merged, open_engine, prompt_of, serving, tiny_model, write


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for number in range(6):
        write(model, root / f"a{number}", number)
    return root


@pytest.fixture(scope="module")
def one_slot(model):
    engine = open_engine(model, rows=2, slots=1)
    engine.warm_up()
    return engine


REQUEST = Request(prompt_of(0), 5)


def test_one_slot_serves_many_adapters_in_turns(model, root, one_slot):
    """An adapter with many requests does not keep the others waiting to the end."""

    async def main():
        with serving(model, root, one_slot) as (driver, store):
            order = []
            names = ["a0"] * 12 + ["a1", "a2"] + ["a0"] * 4
            leases = [await store.lease({name: 1.0}) for name in names]

            async def request(name, lease):
                tokens = await answer(driver, lease, REQUEST)
                order.append(name)
                return tokens

            found = await asyncio.gather(*map(request, names, leases))
            alone = dict(zip(names, found, strict=True))
            assert len({*map(tuple, alone.values())}) == 3
            assert all(tokens == alone[name] for name, tokens in zip(names, found, strict=True))
            return order

    order = asyncio.run(main())
    assert max(order.index("a1"), order.index("a2")) < 16 and order.count("a0") == 16
    assert {*order[-2:]} == {"a0"}  # those that came last


def test_turns_are_bounded():
    """However many come for one adapter, a job waits for one turn of each other."""
    rng = random.Random(0)
    turns = Turns(3)
    turns.add("slow", "slow")
    taken = []
    for number in range(100):
        for _ in range(rng.randrange(4)):
            turns.add("busy", number)
        if len(turns):
            taken.append(turns.take())
    assert taken.index("slow") < 4
    assert [job for job in taken if job != "slow"] == sorted(j for j in taken if j != "slow")


class Lease:
    """A lease of the base."""

    adapter, versions = None, ()

    def __init__(self):
        self.released = 0

    def release(self):
        self.released += 1


def job_of(request, events):
    return Job(request, Lease(), events.append)


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_cancelled_jobs_free_rows_and_leases(one_slot):
    driver = Driver(one_slot)
    driver.start()
    try:
        events = []
        jobs = [job_of(Request(prompt_of(i), 30), events) for i in range(6)]
        for job in jobs:
            driver.submit(job)
        for job in jobs:
            driver.cancel(job)
            driver.cancel(job)
        wait_until(lambda: not driver.waiting and not driver.running)
        assert [job.lease.released for job in jobs] == [1] * 6
        last = job_of(Request(prompt_of(1), 3), events)
        driver.submit(last)
        wait_until(lambda: last.lease.released)
        assert one_slot.free_rows == 2
    finally:
        driver.stop()


def test_a_caller_that_has_gone_frees_its_row(one_slot):
    driver = Driver(one_slot)
    driver.start()
    try:

        def gone(event):
            raise RuntimeError("Event loop is closed")

        job = Job(Request(prompt_of(0), 30), Lease(), gone)
        driver.submit(job)
        wait_until(lambda: job.lease.released == 1 and one_slot.free_rows == 2)
    finally:
        driver.stop()


def test_a_full_line_is_refused(one_slot):
    driver = Driver(one_slot, max_waiting=3)  # not started: all wait
    events = []
    for number in range(3):
        driver.submit(job_of(Request(prompt_of(number), 2), events))
    job = job_of(REQUEST, events)
    with pytest.raises(Full, match="3 requests wait already"):
        driver.submit(job)
    assert job.lease.released == 1 and driver.waiting == 3
    driver.start()
    wait_until(lambda: sum(event.finish_reason is not None for event in events) == 3)
    driver.stop()


def test_bad_requests_are_refused_at_once(model, root, one_slot):
    async def main():
        with serving(model, root, one_slot) as (driver, store):
            lease = await store.lease({"a0": 1.0, "a1": 0.5})
            request = dataclasses.replace(REQUEST, adapter=lease.adapter)
            with pytest.raises(UserError, match="need as many slots"):
                driver.submit(Job(request, lease, print))
            for bad in (Request([], 2), Request([1], 100), Request([10**6], 2)):
                job = job_of(bad, [])
                with pytest.raises(UserError):
                    driver.submit(job)
                assert job.lease.released == 1

    asyncio.run(main())


def test_draining_ends_what_is_queued(one_slot):
    driver = Driver(one_slot)
    driver.start()
    events = []
    for number in range(5):
        driver.submit(job_of(Request(prompt_of(number), 6), events))
    assert driver.drain(60) and sum(event.finish_reason is not None for event in events) == 5
    with pytest.raises(Closed, match="shutting down"):
        driver.submit(job_of(REQUEST, events))
    driver.stop()
    with pytest.raises(Closed):
        asyncio.run(driver.run(lambda: None))


def test_an_engine_that_fails_ends_every_job(model, monkeypatch):
    engine = Engine(model, rows=1, max_length=40)
    driver = Driver(engine)
    events = [[], [], []]
    jobs = [job_of(Request(prompt_of(i), 20), own) for i, own in enumerate(events)]
    for job in jobs:
        driver.submit(job)

    def fail():
        raise MemoryError("no memory")

    monkeypatch.setattr(engine, "step", fail)
    driver.start()
    wait_until(lambda: all(job.lease.released == 1 for job in jobs))
    wait_until(lambda: all(map(len, events)))
    assert all(isinstance(own[-1], Closed) and "MemoryError" in str(own[-1]) for own in events)
    assert isinstance(driver.failed, MemoryError)
    with pytest.raises(Closed, match="the engine has failed"):
        driver.submit(job_of(REQUEST, []))
    driver.stop()


def test_sampling_passes_through(model, root, one_slot):
    """Every field of `Sampling` reaches the engine as it is given."""
    settings = Sampling(
        temperature=0.9,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        seed=5,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={5: 2.0},
        min_new_tokens=3,
    )
    request = Request(prompt_of(3), 8, sampling=settings, number=2)
    (expected,) = Engine(model, rows=1, max_length=40).answer([request])

    async def main():
        with serving(model, root, one_slot) as (driver, store):
            return (await ask(driver, store, {}, request))[0]

    assert asyncio.run(main()) == expected.tokens


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_base_is_the_same_with_adapters_loaded(family, tmp_path):
    """Bit for bit, experts too, alone and in a batch with adapters, in both orders."""
    model = random_model(family, **FAMILIES[family].fields)
    for number in range(2):
        write(model, tmp_path / f"a{number}", number)
    engine = open_engine(model, rows=3, slots=2)
    request = Request(prompt_of(1), 8, log_probs=0)
    (alone,) = engine.answer([request])

    async def main():
        with serving(model, tmp_path, engine) as (driver, store):
            names = [{}, {"a0": 1.0}, {"a1": 1.0}, {}, {"a1": 1.0}, {"a0": 1.0}]
            return await asyncio.gather(*(ask(driver, store, one, request) for one in names))

    found = [tokens for tokens, _ in asyncio.run(main())]
    assert found[0] == found[3] == alone.tokens
    assert found[1] == found[5] and found[2] == found[4] and found[1] != found[2]
    (again,) = engine.answer([request])
    assert np.array_equal(again.log_probs.own, alone.log_probs.own)


def test_the_stop_token_has_log_probabilities(model):
    engine = Engine(model, rows=1, max_length=40)
    (plain,) = engine.answer([Request(prompt_of(0), 4, log_probs=2)])
    stop = plain.tokens[-1]
    at = plain.tokens.index(stop)
    (stopped,) = engine.answer([Request(prompt_of(0), 4, [stop], log_probs=2)])
    assert stopped.tokens == plain.tokens[:at] and stopped.stop_token == stop
    for part in ("own", "top_ids", "top_values"):
        mine, all_ = getattr(stopped.stop_log_probs, part), getattr(plain.log_probs, part)
        assert np.array_equal(mine, all_[at : at + 1])


def test_live_adapters_equal_merged_ones(model, root, one_slot):
    from lora_jax import formats

    async def main():
        with serving(model, root, one_slot) as (driver, store):
            lease = await store.lease({"a4": 1.0})
            return await answer(driver, lease, REQUEST)

    adapter = formats.read_adapter(root / "a4", model.params)
    assert [asyncio.run(main())] == complete(merged(model, *adapter), [REQUEST.prompt], 5)
