"""The climbmix corpus, from a server on this machine that answers as the dataset hub does, and fails as networks do."""

import ast
import math
import os
import pickle
import re
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub

import prepare

VAL, FIRST, SECOND = f"shard_{prepare.CLIMBMIX_TRAIN_SHARDS:05d}.parquet", "shard_00000.parquet", "shard_00001.parquet"
ALWAYS = math.inf
BLOCK = 2**13  # bytes: what a connection may at most have brought in vain
TOKEN = "hf_N0tForYourEyes"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, folder):
    """Three small shards of real text."""
    path, rng, files = tmp_path_factory.mktemp("shards") / "shard.parquet", np.random.default_rng(0), {}
    texts = [file.read_text() for file in sorted(folder.rglob("*.py"))]
    for name in (FIRST, SECOND, VAL):
        pq.write_table(
            pa.table({"text": [texts[i] for i in rng.integers(0, len(texts), 20)]}), path, compression="none"
        )
        files[name] = path.read_bytes()
    return files


@pytest.fixture
def hub(shards, tmp_path, monkeypatch):
    """A hub of these shards, an empty cache, and no waiting between tries."""
    with Hub(dict(shards)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0))
        yield hub


def climbmix(num_shards=1):
    corpus, _ = prepare.choose_corpus("climbmix", num_shards)
    return corpus


def arrive(hub, num_shards=1):
    """Prepare, and see that every shard is there, is the hub's, byte for byte, and no part of one is left."""
    corpus = climbmix(num_shards)
    prepare.prepare(corpus)
    names = prepare.shard_names(corpus)
    assert len(names) == num_shards + 1
    for name in names:
        assert (corpus.directory / name).read_bytes() == hub.files[name]
    assert not list(corpus.directory.glob("*.part"))
    return corpus


def give_up(problem, name=FIRST, num_shards=1):
    """Prepare in vain, and see that the message names the problem, the shard and the command that goes on."""
    corpus = climbmix(num_shards)
    with pytest.raises(SystemExit) as stopped:
        prepare.prepare(corpus)
    message = str(stopped.value)
    assert re.search(problem, message)
    assert name in message
    assert f"`uv run prepare.py --corpus climbmix --shards {num_shards}`" in message
    assert not (corpus.directory / name).exists()
    return corpus


def finish_after(hub, kept):
    """With the fault gone, prepare again: only what was not there is asked for."""
    hub.mend()
    hub.requests.clear()
    arrive(hub)
    assert not hub.asked("cdn", VAL)  # it came the first time
    (request,) = hub.asked("cdn", FIRST)
    assert request.range == (f"bytes={kept}-" if kept else None)
    assert request.sent == len(hub.files[FIRST]) - kept


def part_size(corpus):
    return prepare.file_size(corpus.directory / f"{FIRST}.part")


def test_shards_arrive_whole_and_become_a_corpus(hub):
    corpus = arrive(hub, 2)
    assert all(hub.sent(name) == len(data) for name, data in hub.files.items())
    assert len(list(corpus.directory.glob("train_*.tokens"))) == 2
    tokenizer = prepare.Tokenizer(corpus)
    x, y, epoch = next(prepare.make_dataloader(tokenizer, 2, 2048, "train"))
    assert x.shape == y.shape == (2, 2048)
    assert epoch > 1  # so few documents fill the packing buffer in several passes
    before = len(hub.requests)
    prepare.prepare(corpus)
    assert len(hub.requests) == before


@pytest.mark.parametrize(("asked", "given"), [(None, 10), (1, 1), (6542, 6542), (-1, 6542)])
def test_as_many_training_shards_are_taken_as_asked_for_and_that_for_validation_first(asked, given):
    names = prepare.shard_names(climbmix(asked))
    assert names[0] == "shard_06542.parquet"
    assert names[1:] == [f"shard_{number:05d}.parquet" for number in range(given)]


@pytest.mark.parametrize("asked", [0, -2, 6543, 99999])
def test_no_other_number_of_shards_can_be_asked_for(asked):
    with pytest.raises(SystemExit, match=rf"--shards {asked} with climbmix: .*1 to 6542 \(-1: all\)"):
        climbmix(asked)


def test_more_shards_leave_those_that_are_there_alone(hub):
    arrive(hub, 1)
    hub.requests.clear()
    arrive(hub, 2)
    assert {request.name for request in hub.requests} == {SECOND}


# A body that breaks off -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "reset"),
    [
        *((at, False) for at in (0, 1, -1, BLOCK, BLOCK + 1)),
        *((int(at), reset) for at in np.random.default_rng(1).integers(10**9, size=5) for reset in (False, True)),
    ],
)
def test_a_download_that_breaks_off_goes_on_where_it_ended(hub, at, reset):
    size = len(hub.files[FIRST])
    cut = at % size
    hub.fail(name=FIRST, cut=cut, reset=reset)
    arrive(hub)
    _, again = hub.asked("cdn", FIRST)
    kept = size - again.sent
    assert again.range == (f"bytes={kept}-" if kept else None)
    assert kept <= cut
    assert reset or kept > cut - BLOCK  # what a reset connection brought is lost before it is read


@pytest.mark.parametrize("cut", [BLOCK, 20_000])
def test_connections_that_all_break_off_bring_the_shard_together(hub, cut):
    hub.fail(times=ALWAYS, cut=cut)
    arrive(hub, 2)
    assert all(hub.sent(name) < 2 * len(data) for name, data in hub.files.items())


def test_connections_that_bring_nothing_are_given_up_and_what_came_before_is_kept(hub):
    hub.fail(name=FIRST, times=ALWAYS, cut=0)
    hub.fail(name=FIRST, cut=100_000)
    corpus = give_up("bytes")
    kept = part_size(corpus)
    assert 100_000 - BLOCK < kept <= 100_000
    finish_after(hub, kept)


def test_a_stalled_connection_is_given_up_and_another_goes_on(hub, monkeypatch):
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.5)
    hub.fail(name=FIRST, stall=100_000)
    arrive(hub)
    _, again = hub.asked("cdn", FIRST)
    assert 100_000 - BLOCK < len(hub.files[FIRST]) - again.sent <= 100_000


def test_a_hub_that_always_stalls_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.3)
    hub.fail(name=FIRST, times=ALWAYS, stall=0)
    give_up("timed out")
    finish_after(hub, 0)


def test_a_server_that_ignores_ranges_still_brings_the_shard(hub):
    hub.fail(name=FIRST, times=ALWAYS, ignore_range=True)
    hub.fail(name=FIRST, cut=100_000)
    arrive(hub)
    assert hub.sent(FIRST) == 100_000 + len(hub.files[FIRST])


def test_a_server_that_ignores_ranges_and_always_breaks_off_is_given_up(hub):
    hub.fail(name=FIRST, times=ALWAYS, ignore_range=True, cut=100_000)
    kept = part_size(give_up("bytes"))
    finish_after(hub, kept)


# A body that is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"longer": -1000}, {"longer": 1000}, {"flip": 100}, {"flip": -1}], ids=str)
def test_a_wrong_body_is_thrown_away_and_fetched_again(hub, fault):
    if "flip" in fault:
        fault = {"flip": fault["flip"] % len(hub.files[FIRST])}
    hub.fail(name=FIRST, **fault)
    arrive(hub)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"longer": -1000}, "HTTP 416|bytes came"),
        ({"longer": 1000}, "another sha256"),
        ({"flip": 100}, "another sha256"),
    ],
    ids=str,
)
def test_a_body_that_is_always_wrong_is_given_up(hub, fault, problem):
    hub.fail(name=FIRST, times=ALWAYS, **fault)
    kept = part_size(give_up(problem))
    assert hub.sent(FIRST) < 6 * len(hub.files[FIRST])  # not for ever
    finish_after(hub, kept)


def test_a_flipped_bit_before_a_break_costs_the_shard_once_more_and_no_more(hub):
    hub.fail(name=FIRST, flip=100, cut=100_000)
    arrive(hub)
    assert hub.sent(FIRST) <= 2 * len(hub.files[FIRST]) + BLOCK


def test_a_part_longer_than_the_shard_is_thrown_away(hub):
    corpus = climbmix()
    corpus.directory.mkdir(parents=True)
    (corpus.directory / f"{FIRST}.part").write_bytes(bytes(len(hub.files[FIRST]) + 1))
    arrive(hub)
    assert hub.sent(FIRST) == len(hub.files[FIRST])


def test_a_range_that_begins_beyond_the_end_leads_to_the_start(hub):
    hub.fail(name=FIRST, cut=100_000)
    hub.fail(name=FIRST, times=2, longer=50_000 - len(hub.files[FIRST]))  # a stale copy, shorter than what is there
    arrive(hub)


# A hub that is not well -----------------------------------------------------------------------------------------------


def test_a_hub_that_is_away_for_a_minute_is_outlasted():
    assert sum(prepare.RETRY_SECONDS) >= 60


@pytest.mark.parametrize("place", ["hub", "cdn"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_storm_that_ends_is_outlasted(hub, monkeypatch, place, status):
    monkeypatch.setattr(prepare, "RETRY_SECONDS", (0,) * 5)
    hub.fail(place, name=FIRST, times=5, status=status)
    arrive(hub)
    assert hub.sent(FIRST) == len(hub.files[FIRST])


@pytest.mark.parametrize("place", ["hub", "cdn"])
def test_a_storm_that_does_not_end_is_given_up(hub, place):
    hub.fail(place, name=FIRST, times=ALWAYS, status=503)
    give_up("HTTP 503")
    hub.mend()
    arrive(hub)
    assert all(hub.sent(name) == len(hub.files[name]) for name in (FIRST, VAL))


@pytest.mark.parametrize("fault", [{"status": 503}, {"flip": 100}], ids=str)
def test_the_command_that_gives_up_exits_with_1_and_says_how_to_go_on(hub, command, fault):
    hub.fail(name=FIRST, times=ALWAYS, **fault)
    script = "import prepare; prepare.RETRY_SECONDS = (0, 0); prepare.main()"
    result = command("-c", script, "--corpus", "climbmix", "--shards", 1)
    assert result.returncode == 1
    assert f"\n{FIRST}: " in result.stdout
    assert "`uv run prepare.py --corpus climbmix --shards 1` goes on from there" in result.stdout
    assert "Traceback" not in result.stdout
    hub.mend()
    arrive(hub)
    assert hub.sent(VAL) == len(hub.files[VAL])


@pytest.mark.parametrize(("place", "status"), [("hub", 429), ("hub", 503), ("cdn", 503)])
def test_what_the_server_asks_to_be_left_alone_for_is_waited(hub, place, status):
    hub.fail(place, name=FIRST, status=status, headers={"Retry-After": "1"})
    arrive(hub)
    first, second = hub.asked(place, FIRST)[:2]
    assert second.time - first.time >= 1


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "HF_ENDPOINT")])
def test_a_shard_that_is_refused_is_named_at_once_and_before_any_is_fetched(hub, status, advice):
    hub.fail("hub", name=SECOND, times=ALWAYS, status=status)
    corpus = give_up(rf"shard_00001\.parquet answered {status}.*{advice}", SECOND, 2)
    assert len(hub.asked("hub", SECOND)) == 1
    assert not hub.asked("cdn")
    assert not list(corpus.directory.glob("shard*"))
    hub.mend()
    arrive(hub, 2)


def test_a_shard_that_is_not_there_is_named(hub):
    del hub.files[SECOND]
    give_up(r"shard_00001\.parquet answered 404.*HF_ENDPOINT", SECOND, 2)


def test_a_signature_that_expired_is_asked_for_again(hub):
    hub.fail(name=FIRST, status=403)
    arrive(hub)
    first, second = hub.asked("cdn", FIRST)
    assert first.path != second.path
    assert [request.place for request in hub.requests if request.name == FIRST] == ["hub"] * 2 + ["cdn"] + [
        "hub",
        "cdn",
    ]


def test_a_repository_that_was_renamed_is_followed(hub):
    hub.renamed = "someone/else-entirely"
    arrive(hub)


@pytest.mark.parametrize(("what", "value"), [("size", ""), ("etag", ""), ("size", "many")])
def test_a_server_that_is_no_dataset_hub_is_told_from_one(hub, what, value):
    hub.fail("hub", times=ALWAYS, **{what: value})
    with pytest.raises(SystemExit, match=r"no size and sha256 .* came with http:.*: no dataset hub"):
        prepare.prepare(climbmix())
    assert not any(map(hub.sent, hub.files))


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub):
    hub.fail("hub", name=FIRST, times=ALWAYS, size=10**15)
    with pytest.raises(SystemExit, match=r"need about 2250000\.0 GB more, \d+\.\d GB are free.*AUTORESEARCH_CACHE"):
        prepare.prepare(climbmix())
    assert not hub.asked("cdn")
    hub.mend()
    arrive(hub)


# No network -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:9", "https://hub.invalid", "huggingface.co", "http://[::1", f"http://{'a' * 64}.com", "ftp://a"],
)
def test_without_a_network_the_message_says_what_to_do(hub, monkeypatch, endpoint):
    monkeypatch.setattr(prepare, "OFFLINE_SECONDS", 0.5)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(SystemExit, match=r"did not arrive.*--corpus python.*HF_ENDPOINT"):
        prepare.prepare(climbmix())


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])
def test_the_command_without_a_network_says_what_to_do(hub, command, endpoint):
    started = ["prepare.py"] if "127" in endpoint else ["-c", "import prepare as p; p.OFFLINE_SECONDS = 1; p.main()"]
    result = command(*started, "--corpus", "climbmix", "--shards", 1, HF_ENDPOINT=endpoint)
    assert result.returncode == 1
    assert re.search(r"--corpus python.*HF_ENDPOINT", result.stdout)
    assert "Traceback" not in result.stdout


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hub_that_answers_too_late_is_no_network(hub, monkeypatch):
    monkeypatch.setattr(prepare, "OFFLINE_SECONDS", 0.2)
    hub.fail("hub", wait=0.4)
    with pytest.raises(SystemExit, match=r"can't be reached.*HF_ENDPOINT"):
        prepare.prepare(climbmix())
    time.sleep(0.4)  # the answer comes, and finds nobody
    arrive(hub)


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cdn", ["another name", "another port"])
def test_the_token_goes_to_the_hub_alone(hub, monkeypatch, cdn):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if cdn == "another port":
        hub.cdn = hub.cdn_on_another_port
    hub.fail(name=FIRST, cut=100_000)
    arrive(hub)
    assert len(hub.asked("cdn")) == 3
    for request in hub.requests:
        assert request.authorization == (f"Bearer {TOKEN}" if request.place == "hub" else None)
        assert request.host == (hub.endpoint if request.place == "hub" else hub.cdn).removeprefix("http://")


def test_the_token_does_not_follow_a_repository_to_another_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    location = f"{hub.cdn_on_another_port}/datasets/{hub.repo}/resolve/main/{FIRST}"
    hub.fail("hub", name=FIRST, status=307, headers={"Location": location})
    arrive(hub)
    (elsewhere,) = (request for request in hub.requests if request.host in hub.cdn_on_another_port)
    assert elsewhere.authorization is None


@pytest.mark.parametrize("token", [TOKEN, None])
def test_netrc_does_not_replace_the_token(hub, monkeypatch, tmp_path, token):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\nmachine localhost login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    arrive(hub)
    for request in hub.requests:
        assert request.authorization == (f"Bearer {token}" if token and request.place == "hub" else None)


@pytest.mark.parametrize("inside", ["\n", " ", "\r\nX-Evil: 1", "é", "\0"], ids=ascii)
def test_a_token_that_can_be_none_is_refused_without_being_shown(hub, monkeypatch, capsys, inside):
    if inside == "\0":  # no environment can hold it
        monkeypatch.setattr(os, "environ", os.environ | {"HF_TOKEN": f"{TOKEN}\0{TOKEN}"})
    else:
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{inside}{TOKEN}")
    with pytest.raises(SystemExit, match=r"HF_TOKEN holds .* copy it again, or unset it") as stopped:
        prepare.prepare(climbmix())
    seen = "".join(traceback.format_exception(stopped.value)) + "".join(capsys.readouterr())
    assert "N0tForYourEyes" not in seen
    assert not hub.requests


def test_space_around_a_token_is_no_part_of_it(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    arrive(hub)
    assert {request.authorization for request in hub.asked("hub")} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "fault",
    [
        *({"place": "hub", "status": status} for status in (401, 403, 404, 429, 503)),
        *({"place": "hub", what: ""} for what in ("size", "etag", "location")),
        {"place": "hub", "location": "http://127.0.0.1:9/repos?Signature=hush"},
        {"place": "hub", "location": "ftp://127.0.0.1/repos?Signature=hush"},
        {"place": "hub", "location": f"http://{'a' * 64}.com/repos?Signature=hush"},
        {"place": "hub", "location": "http://[/repos?Signature=hush"},
        *({"status": status} for status in (403, 404, 416, 503)),
        {"cut": 100_000, "reset": True, "ignore_range": True},
        {"stall": 0},
        {"flip": 100},
        {"longer": -1000},
        {"longer": 1000},
        {"no network": True},
    ],
    ids=str,
)
def test_no_failure_shows_the_token_or_a_signature(hub, monkeypatch, capfd, fault):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(prepare, "OFFLINE_SECONDS", 0.5)
    if "no network" in fault:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.fail(name=FIRST, times=ALWAYS, **fault)
    with pytest.raises(SystemExit) as stopped:
        prepare.prepare(climbmix())
    seen = "".join(traceback.format_exception(stopped.value)) + "".join(capfd.readouterr())
    for path in Path(os.environ["AUTORESEARCH_CACHE"]).rglob("*"):
        seen += path.read_bytes().decode("latin-1") if path.is_file() else path.name
    assert "N0tForYourEyes" not in seen
    assert "Signature=" not in seen


# What comes is data ---------------------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "source"])
@pytest.mark.parametrize("name", [FIRST, VAL])
def test_a_shard_that_is_code_is_refused_and_does_not_run(hub, tmp_path, kind, name):
    trap = {"pickle": pickle.dumps(Trap(tmp_path / "sprung")), "source": b"import os; os.mkdir('sprung')\n"}[kind]
    hub.files[name] = trap
    with pytest.raises(SystemExit, match=rf"{name}: not a readable parquet file"):
        prepare.prepare(climbmix())
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_the_schema_of_a_shard_stays_shut(hub, shards, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": trap}
    text = pq.read_table(pa.BufferReader(shards[FIRST])).column("text")
    schema = pa.schema([pa.field("text", pa.string(), metadata=kind)], metadata=kind)
    pq.write_table(pa.table([text], schema=schema), tmp_path / "shard.parquet")
    hub.files[FIRST] = (tmp_path / "shard.parquet").read_bytes()
    assert pq.read_schema(tmp_path / "shard.parquet").field("text").metadata[b"ARROW:extension:metadata"] == trap
    corpus = arrive(hub)
    documents = prepare.read_documents(corpus.directory / FIRST, prepare.make_meter())
    assert list(documents) == [document for document in text.to_pylist() if document]
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it would have worked


def test_prepare_has_no_means_to_run_what_it_reads():
    nodes = list(ast.walk(ast.parse(Path(prepare.__file__).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert "json.loads" in called
    assert not imported & {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp"}
    assert not called & {"eval", "exec", "compile", "__import__", "importlib.import_module", "torch.load", "np.load"}
    assert not [call for call in calls for keyword in call.keywords if keyword.arg == "allow_pickle"]


# What is shown meanwhile ----------------------------------------------------------------------------------------------


def test_a_line_says_how_many_bytes_and_shards_came_and_how_fast(hub, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "LIVE_END", "\n")  # lines come every 0.2 s then, instead of 12
    monkeypatch.setenv("COLUMNS", "200")
    hub.fail(times=ALWAYS, pace=0.05)
    arrive(hub)
    line = r"download, [01] of 2 shards: (\d+) % \|.+\| [\d.]+k of [\d.]+k, [\d.]+k?B/s, [\d:?]+ left \(\d+ s\)"
    percentages = [int(number) for number in re.findall(line, capsys.readouterr().out)]
    assert percentages
    assert percentages == sorted(percentages)
    assert max(percentages) <= 100


def test_progress_does_not_count_bytes_that_were_thrown_away(hub):
    hub.fail(name=FIRST, flip=100)
    hub.fail(name=VAL, cut=100_000)
    hub.fail(name=VAL, times=2, longer=50_000 - len(hub.files[VAL]))
    corpus, meter = climbmix(), prepare.make_meter()
    corpus.directory.mkdir(parents=True)
    prepare.download(corpus, prepare.shard_names(corpus), meter)
    assert meter.n == meter.total == len(hub.files[FIRST]) + len(hub.files[VAL])
