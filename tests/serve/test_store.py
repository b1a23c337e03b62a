"""The store of adapters: leases, eviction, replacement, and the answers that come of it."""

import asyncio
import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import formats, lora
from lora_jax.errors import UserError
from lora_jax.generate import Engine, Request
from lora_jax.serve.folder import Missing

from ..engines import complete
from .adapters import answer, ask, merged, open_engine, prompt_of, serving, tiny_model, write

ADAPTERS = 12
NEW = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for number in range(ADAPTERS):
        write(model, root / f"a{number}", number)
    return root


@pytest.fixture(scope="module")
def oracle(model, root):
    """Greedy answers of the base and of each merged model."""

    engine = Engine(model, rows=1, max_length=40)
    found = {}
    for number in [None, *range(ADAPTERS)]:
        params = model.params
        if number is not None:
            adapter = formats.read_adapter(root / f"a{number}", model.params)
            params = merged(model, *adapter).params
        engine.use(params)
        (found[number],) = complete(model, [prompt_of(0)], NEW, engine=engine)
    assert len({tuple(tokens) for tokens in found.values()}) > ADAPTERS // 2
    return found


@pytest.fixture(scope="module")
def engine(model):
    engine = open_engine(model)
    engine.warm_up()
    return engine


REQUEST = Request(prompt_of(0), NEW)


def run(model, root, engine, work, **options):
    """Run a coroutine over a driver and a store; afterwards nothing is leased."""

    async def main():
        with serving(model, root, engine, **options) as (driver, store):
            result = await work(driver, store)
            await until(lambda: no_leases(store))
            await until(lambda: not driver.running and not driver.waiting)
            evict_all(store)
            await until(lambda: not engine.adapters and not engine.busy)
            return result

    return asyncio.run(main())


def evict_all(store):
    """Evict what nobody has leased, as a store that is full does."""
    for version in [version for version in store._versions if not version.leases]:
        store._drop(version)


async def until(condition):
    """Wait for the driver's thread, which may be slow on a busy machine."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the driver's thread has not done its part within 30 s")


def no_leases(store):
    return not any(version.leases for version in store._versions)


async def settled():
    for _ in range(3):
        await asyncio.sleep(0.01)


def test_every_adapter_answers_as_its_merged_model(model, root, engine, oracle):
    async def work(driver, store):
        names = [None, *range(ADAPTERS)] * 2
        terms = [{} if name is None else {f"a{name}": 1.0} for name in names]
        found = await asyncio.gather(*(ask(driver, store, one, REQUEST) for one in terms))
        assert [tokens for tokens, _ in found] == [oracle[name] for name in names]
        revisions = {revision for _, revision in found}
        assert len(revisions) == ADAPTERS + 1
        assert store.host[0] <= 5 and sum(store.loads.values()) >= ADAPTERS
        assert store.evictions >= ADAPTERS - 5

    programs = engine.compiled_programs
    run(model, root, engine, work, host_adapters=5)
    assert engine.compiled_programs == programs


def test_one_read_for_concurrent_leases(model, root, engine):
    async def work(driver, store):
        leases = await asyncio.gather(*(store.lease({"a1": 1.0}) for _ in range(20)))
        assert store.loads == {"a1": 1}
        assert len({id(lease.versions[0]) for lease in leases}) == 1
        for lease in leases:
            lease.release()
            lease.release()

    run(model, root, engine, work)


def test_a_replaced_version_answers_for_those_who_leased_it(model, root, engine, oracle):
    async def work(driver, store):
        old = await store.lease({"a1": 1.0})
        info = await store.load("a1", "a2", replace=True, pinned=False)
        new = await store.lease({"a1": 1.0})
        assert old.revision != new.revision == info.revision
        first, second = await asyncio.gather(
            answer(driver, old, REQUEST), answer(driver, new, REQUEST)
        )
        assert (first, second) == (oracle[1], oracle[2])
        await until(lambda: store.host[0] == 1)  # the old one is gone with its lease

    run(model, root, engine, work)


def test_an_unloaded_name_is_gone_until_it_is_loaded(model, root, engine, oracle):
    async def work(driver, store):
        lease = await store.lease({"a3": 1.0})
        store.unload("a3")
        for ask_for in (lambda: store.lease({"a3": 1.0}), lambda: as_async(store.info, "a3")):
            with pytest.raises(Missing, match="there is no adapter 'a3'"):
                await ask_for()
        assert "a3" not in [info.name for info in await store.infos()]
        assert await answer(driver, lease, REQUEST) == oracle[3]
        with pytest.raises(Missing):
            store.unload("a3")
        await store.load("a3", "a3", replace=False, pinned=False)
        assert (await ask(driver, store, {"a3": 1.0}, REQUEST))[0] == oracle[3]
        for path in ("a3", "a4"):  # resident, and after it was evicted
            with pytest.raises(UserError, match="exists already; set load_inplace"):
                await store.load("a3", path, replace=False, pinned=False)
            evict_all(store)
        with pytest.raises(UserError, match="exists already"):  # in the folder, and never read
            await store.load("a9", "a4", replace=False, pinned=False)

    run(model, root, engine, work)


async def as_async(function, *arguments):
    return function(*arguments)


def test_a_sum_is_that_of_the_trees(model, root, engine, error):
    trees = [formats.read_adapter(root / f"a{number}", model.params) for number in (0, 1)]
    merges = [lora.merge(lora.bind(model.params, *tree)) for tree in trees]
    params = jax.tree.map(
        lambda base, x, y: base + 0.7 * (x - base) - 0.3 * (y - base), model.params, *merges
    )
    plain = Engine(model, rows=1, max_length=40)
    plain.use(params)
    (expected,) = complete(model, [prompt_of(0)], NEW, engine=plain)

    async def work(driver, store):
        return (await ask(driver, store, {"a0": 0.7, "a1": -0.3}, REQUEST))[0]

    assert run(model, root, engine, work) == expected


def test_leases_wait_for_room_in_order(model, root, engine):
    async def work(driver, store):
        held = [await store.lease({f"a{number}": 1.0}) for number in (0, 1)]
        order = []

        async def late(name):
            lease = await store.lease({name: 1.0})
            order.append(name)
            await asyncio.sleep(0)
            lease.release()

        tasks = []
        for name in ("a2", "a3", "a0"):
            tasks.append(asyncio.ensure_future(late(name)))
            await settled()
        assert not order and store.host[0] == 2
        held[0].release()  # room for one: two would be read at once, and end in any order
        await asyncio.gather(*tasks)
        held[1].release()
        assert order == ["a2", "a3", "a0"] and store.host[0] <= 2

    run(model, root, engine, work, host_adapters=2)


def test_a_request_that_never_fits_is_refused(model, root, engine):
    """Also if a part of it is in host memory already: it would wait for itself."""

    async def work(driver, store):
        terms = dict.fromkeys(("a0", "a1", "a2"), 1.0)
        with pytest.raises(UserError, match="3 adapters of .* do not fit"):
            await store.lease(terms)
        (await store.lease({"a0": 1.0})).release()
        with pytest.raises(UserError, match="2 adapters of .* next to 1 that are pinned or in"):
            await asyncio.wait_for(store.lease(terms), 20)
        await ask(driver, store, {"a0": 0.5, "a1": 0.5}, REQUEST)

    run(model, root, engine, work, host_adapters=2)


def test_seconds_of_loads_add_up(model, root, engine):
    async def work(driver, store):
        seconds = [0.0]
        for _ in range(3):
            (await store.lease({"a0": 1.0})).release()
            await until(lambda: no_leases(store))
            seconds.append(store.load_seconds["a0"])
            evict_all(store)
        assert store.loads["a0"] == 3 and seconds == sorted({*seconds})

    run(model, root, engine, work)


def test_pinned_adapters_stay(model, root, engine):
    async def work(driver, store):
        await store.load("a4", "a4", replace=False, pinned=True)
        for number in range(4):
            (await store.lease({f"a{number}": 1.0})).release()
        assert store.loads["a4"] == 1 and store.info("a4").resident != "disk"
        assert store.info("a4").pinned and store.info("a0").resident == "disk"
        with pytest.raises(UserError, match="do not fit the host memory .* next to 1 that"):
            await store.lease({"a0": 0.5, "a1": 0.5})

    run(model, root, engine, work, host_adapters=2)


def test_bytes_are_limited_too(model, root, engine):
    async def work(driver, store):
        for number in range(ADAPTERS):
            (await store.lease({f"a{number}": 1.0})).release()
            assert store.host[1] <= 60_000
        assert store.evictions

    run(model, root, engine, work, host_bytes=60_000)


def test_an_idle_adapter_stays_visible(model, root, engine):
    async def work(driver, store):
        await ask(driver, store, {"a5": 1.0}, REQUEST)
        infos = {info.name: info for info in await store.infos()}
        assert len(infos) == ADAPTERS and infos["a5"].resident == "device"
        assert infos["a6"].resident == "disk" and infos["a6"].revision is None
        assert infos["a6"].rank == 2 and infos["a5"].rank == 3 and infos["a5"].created > 10**9

    run(model, root, engine, work)


def test_files_that_change_are_no_silent_new_version(model, root, engine, tmp_path):
    shutil.copytree(root / "a0", tmp_path / "x")

    async def work(driver, store):
        first = await store.lease({"x": 1.0})
        shutil.rmtree(tmp_path / "x")
        write(model, tmp_path / "x", 1)
        again = await store.lease({"x": 1.0})
        assert again.revision == first.revision
        first.release(), again.release()
        await until(lambda: no_leases(store))
        evict_all(store)
        with pytest.raises(UserError, match="has other files than when it was loaded"):
            await store.lease({"x": 1.0})
        info = await store.load("x", "x", replace=True, pinned=False)
        assert info.revision != first.revision
        shutil.rmtree(tmp_path / "x")
        evict_all(store)
        with pytest.raises(Missing):
            await store.lease({"x": 1.0})

    run(model, tmp_path, engine, work)


def test_a_bad_adapter_is_refused_while_others_answer(model, root, engine, oracle, tmp_path):
    shutil.copytree(root / "a0", tmp_path / "good")
    shutil.copytree(root / "a0", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])

    async def work(driver, store):
        for _ in range(2):
            with pytest.raises(UserError, match="adapter 'bad'.*truncated") as caught:
                await store.lease({"good": 0.5, "bad": 0.5})
            assert str(tmp_path) not in str(caught.value)
        assert (await ask(driver, store, {"good": 1.0}, REQUEST))[0] == oracle[0]
        shutil.copy(root / "a0" / file.name, file)  # mended: it is read again
        assert (await ask(driver, store, {"bad": 1.0}, REQUEST))[0] == oracle[0]

    run(model, tmp_path, engine, work)


def test_too_many_terms(model, root, engine):
    async def work(driver, store):
        with pytest.raises(UserError, match="3 adapters in one request are more than"):
            await store.lease(dict.fromkeys(("a0", "a1", "a2"), 1.0))

    run(model, root, engine, work, max_terms=2)


def test_five_hundred_requests_over_two_hundred_adapters(model, engine, tmp_path_factory):
    """Loads, replacements and unloads meanwhile: each answer is that of the version leased."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    home = root / "a0"
    for number in range(8):
        write(model, root / f"a{number}", number)
    for number in range(8, 200):  # other weights, written at the cost of a copy
        shutil.copytree(root / f"a{number % 8}", root / f"a{number}")
        turn(root / f"a{number}", number)
    assert home.exists()
    engine_of_many = open_engine(model, rows=8, slots=8)
    engine_of_many.warm_up()
    programs = engine_of_many.compiled_programs
    answers: dict[str, list] = {}
    directories: dict[str, str] = {}

    async def work(driver, store):
        async def request(index):
            name = f"a{rng.integers(200)}"
            if index % 25 == 0:
                other = f"a{rng.integers(200)}"
                await store.load(name, other, replace=True, pinned=False)
            if index % 40 == 1:
                with contextlib.suppress(Missing):
                    store.unload(f"a{rng.integers(150, 200)}")
            try:
                lease = await store.lease({name: 1.0})
            except Missing:
                assert index  # unloaded before
                return
            directories[lease.revision] = lease.versions[0].directory.name
            tokens = await answer(driver, lease, REQUEST)
            answers.setdefault(lease.revision, []).append(tokens)
            assert store.host[0] <= 32

        pending = set()
        for index in range(500):
            pending.add(asyncio.ensure_future(request(index)))
            if len(pending) >= 40:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*pending)

    run(model, root, engine_of_many, work, host_adapters=32)
    assert engine_of_many.compiled_programs == programs
    assert sum(map(len, answers.values())) > 400 and len(answers) > 100
    check_with_merged(model, root, directories, answers)


def turn(directory, number):
    """Change the weights of an adapter on disk, its digests too."""
    file = directory / "adapter_model.safetensors"
    tensors = {key: value * (1 + 0.01 * number) for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    side = directory / "lora_jax.json"
    content = json.loads(side.read_text())
    del content["digest"]
    side.write_text(json.dumps(content))


def check_with_merged(model, root, directories, answers):
    plain = Engine(model, rows=1, max_length=40)
    for revision, found in answers.items():
        adapter = formats.read_adapter(root / directories[revision], model.params)
        plain.use(merged(model, *adapter).params)
        (expected,) = complete(model, [REQUEST.prompt], NEW, engine=plain)
        assert all(tokens == expected for tokens in found), directories[revision]
