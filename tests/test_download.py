"""Shards of climbmix, from a server on this machine that answers and fails as the hub does."""

import ast
import math
import os
import pickle
import traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub import Hub

import prepare

VAL, FIRST, SECOND = "shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"
SIZE = 300_000  # bytes of a shard
BLOCK = 2**16  # bytes: what a connection may at most have brought in vain
ALWAYS = math.inf
TOKEN = "hf_N0tForYourEyes"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one shard, an empty cache, and no waiting between tries."""
    with Hub({FIRST: np.random.default_rng(0).bytes(SIZE)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(prepare, "RETRY_SECONDS", (0, 0))
        yield hub


def climbmix(num_shards=1):
    return prepare.choose_corpus("climbmix", num_shards)


def shard_path(name=FIRST):
    return prepare.cache_root() / "climbmix" / name


def part_path():
    return shard_path(f"{FIRST}.part")


def arrive(hub):
    """Download the shard, and see that it is the hub's, byte for byte."""
    prepare.download(shard_path(), climbmix())
    assert shard_path().read_bytes() == hub.files[FIRST]
    assert not part_path().exists()


def give_up(problem):
    """Download in vain: the message names the problem; return the size of what is kept."""
    with pytest.raises(SystemExit, match=problem):
        prepare.download(shard_path(), climbmix())
    assert not shard_path().exists()
    return prepare.file_size(part_path())


def arrive_later(hub, kept):
    """With the fault gone, download again: only what was not kept is asked for."""
    hub.recover()
    arrive(hub)
    (request,) = hub.asked("cdn")
    assert request.range == f"bytes={kept}-"
    assert request.sent == SIZE - kept


# A body that breaks off -------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("cut", [0, 1, BLOCK, BLOCK + 1, 234_567, SIZE - 1])
def test_a_download_that_breaks_off_resumes_where_it_ended(hub, cut, reset):
    hub.fail(cut=cut, reset=reset)
    arrive(hub)
    _, again = hub.asked("cdn")
    kept = SIZE - again.sent
    assert again.range == f"bytes={kept}-"
    assert kept <= cut
    assert reset or kept > cut - BLOCK  # what a reset connection brought is lost before it is read


def test_connections_that_all_break_off_bring_the_shard_together(hub):
    hub.fail(times=ALWAYS, cut=2 * BLOCK)
    arrive(hub)
    assert hub.sent(FIRST) < 2 * SIZE


def test_connections_that_bring_nothing_are_given_up_and_what_came_before_is_kept(hub):
    hub.fail(times=ALWAYS, cut=0)
    hub.fail(cut=100_000)
    kept = give_up(rf"{FIRST} did not arrive .* `uv run prepare.py .* --shards 1` resumes it")
    assert 100_000 - BLOCK < kept <= 100_000
    arrive_later(hub, kept)


def test_a_stalled_connection_is_given_up_and_another_resumes(hub, monkeypatch):
    monkeypatch.setitem(prepare.STREAM, "timeout", 0.3)
    hub.fail(stall=100_000)
    arrive(hub)
    _, again = hub.asked("cdn")
    assert 100_000 - BLOCK < SIZE - again.sent <= 100_000


def test_a_server_that_ignores_ranges_still_brings_the_shard(hub):
    hub.fail(times=ALWAYS, ignore_range=True)
    hub.fail(cut=100_000)
    arrive(hub)
    assert hub.sent(FIRST) == 100_000 + SIZE


def test_a_shard_that_came_before_its_last_moment_is_not_fetched_again(hub):
    part_path().parent.mkdir(parents=True)
    part_path().write_bytes(hub.files[FIRST])
    arrive(hub)
    assert hub.sent(FIRST) == 0


# A body that is wrong ---------------------------------------------------------------------------

WRONG = [{"flip": 100}, {"flip": SIZE - 1}, {"longer": 1000}, {"longer": -1000}]


@pytest.mark.parametrize("fault", WRONG, ids=str)
def test_a_wrong_body_is_thrown_away_and_fetched_again(hub, fault):
    hub.fail(**fault)
    arrive(hub)
    assert hub.sent(FIRST) <= 2 * SIZE + 1000


@pytest.mark.parametrize(
    "fault", [*WRONG, {"flip": 100, "cut": 100_000}, {"ignore_range": True, "cut": 1000}], ids=str
)
def test_a_body_that_is_always_wrong_is_given_up_and_does_no_harm(hub, fault, monkeypatch):
    def sleep(seconds):
        assert hub.sent(FIRST) < 6 * SIZE, "it does not end"

    monkeypatch.setattr(prepare.time, "sleep", sleep)
    hub.fail(times=ALWAYS, **fault)
    give_up("did not arrive")
    hub.recover()
    arrive(hub)


def test_a_part_longer_than_the_shard_is_thrown_away(hub):
    part_path().parent.mkdir(parents=True)
    part_path().write_bytes(bytes(SIZE + 1))
    arrive(hub)
    assert hub.sent(FIRST) == SIZE


def test_a_stale_copy_that_is_shorter_than_what_came_leads_to_the_start(hub):
    hub.fail(cut=200_000)
    hub.fail(times=2, longer=-150_000)
    arrive(hub)


# A hub that is not well -------------------------------------------------------------------------


def test_a_hub_that_is_away_for_a_minute_is_outlasted():
    assert sum(prepare.RETRY_SECONDS) >= 60


@pytest.mark.parametrize("place", ["hub", "cdn"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_trouble_that_ends_is_outlasted(hub, place, status):
    hub.fail(place, times=2, status=status)
    arrive(hub)
    assert hub.sent(FIRST) == SIZE


@pytest.mark.parametrize("place", ["hub", "cdn"])
def test_trouble_that_does_not_end_is_given_up(hub, place):
    hub.fail(place, times=ALWAYS, status=503)
    give_up("503 Server Error.*--corpus python needs none")
    arrive_later(hub, 0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_shard_that_the_hub_refuses_is_said_at_once(hub, status):
    hub.fail("hub", times=ALWAYS, status=status)
    give_up(rf"{FIRST} answered {status} .*HF_ENDPOINT.*HF_TOKEN")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [403, 404])
def test_a_signature_that_expired_is_asked_for_again(hub, status):
    hub.fail(status=status)
    arrive(hub)
    first, second = hub.asked("cdn")
    assert first.path != second.path
    assert [request.place for request in hub.requests] == ["hub", "cdn", "hub", "cdn"]


def test_a_repository_that_was_renamed_is_followed(hub):
    hub.renamed = "someone/else-entirely"
    arrive(hub)


@pytest.mark.parametrize("done", [0, 1000, SIZE])
def test_a_server_that_says_neither_size_nor_sha256_is_no_hub(hub, monkeypatch, done):
    part_path().parent.mkdir(parents=True)
    part_path().write_bytes(hub.files[FIRST][:done])
    location = {"Location": f"{hub.cdn}/repos/{FIRST}"}
    hub.fail("hub", times=ALWAYS, status=302, headers=location)
    assert give_up("without size and sha256.*HF_ENDPOINT") == done


@pytest.mark.parametrize("size", ["", "many"])
def test_a_hub_that_says_no_size_is_given_up(hub, size):
    hub.fail("hub", times=ALWAYS, size=size)
    give_up("did not arrive|without size and sha256")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "huggingface.co", "http://[::1"])
def test_without_a_network_the_message_says_what_to_do(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    give_up(r"did not arrive.*--corpus python.*HF_ENDPOINT")


def test_the_command_that_gives_up_exits_with_1_and_says_how_to_resume(hub, command):
    hub.fail(times=ALWAYS, flip=100)
    script = "import prepare; prepare.RETRY_SECONDS = (0, 0); prepare.main()"
    result = command("-c", script, "--corpus", "climbmix", "--shards", 1)
    assert result.returncode == 1
    assert f"\n{FIRST} did not arrive" in result.stdout
    assert "`uv run prepare.py --corpus climbmix --shards 1` resumes" in result.stdout
    assert "Traceback" not in result.stdout


# Secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cdn", ["another name", "another port"])
def test_the_token_goes_to_the_hub_alone(hub, monkeypatch, cdn):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")  # white space is no part of it
    if cdn == "another port":
        hub.cdn = hub.cdn_on_another_port
    hub.fail(cut=100_000)
    arrive(hub)
    assert len(hub.asked("cdn")) == 2
    for request in hub.requests:
        is_hub = request.place == "hub"
        assert request.authorization == (f"Bearer {TOKEN}" if is_hub else None)
        assert request.host in (hub.endpoint if is_hub else hub.cdn)


def test_the_token_does_not_follow_a_repository_to_another_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    location = f"{hub.cdn_on_another_port}/datasets/{hub.repo}/resolve/main/{FIRST}"
    hub.fail("hub", status=307, headers={"Location": location})
    arrive(hub)
    (elsewhere,) = (r for r in hub.requests if r.host in hub.cdn_on_another_port)
    assert elsewhere.authorization is None


@pytest.mark.parametrize("token", [TOKEN, None])
def test_passwords_of_netrc_go_nowhere(hub, monkeypatch, tmp_path, token):
    (tmp_path / "netrc").write_text("default login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    arrive(hub)
    for request in hub.requests:
        is_sent = token and request.place == "hub"
        assert request.authorization == (f"Bearer {token}" if is_sent else None)


@pytest.mark.parametrize("inside", ["\n", " ", "\r\nX-Evil: 1", "é"], ids=ascii)
def test_a_token_that_can_be_none_is_refused_without_being_shown(hub, monkeypatch, inside):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{inside}{TOKEN}")
    with pytest.raises(SystemExit, match=r"HF_TOKEN holds .* copy it again") as stopped:
        prepare.download(shard_path(), climbmix())
    assert "N0tForYourEyes" not in "".join(traceback.format_exception(stopped.value))
    assert not hub.requests


@pytest.mark.parametrize(
    "fault",
    [
        *({"place": "hub", "status": status} for status in (401, 404, 503)),
        *({"place": "hub", what: ""} for what in ("etag", "location")),
        {"place": "hub", "location": "http://127.0.0.1:9/repos?Signature=hush"},
        {"place": "hub", "location": "ftp://127.0.0.1/repos?Signature=hush"},
        {"place": "hub", "location": f"http://{'a' * 64}.com/repos?Signature=hush"},
        {"place": "hub", "location": "http://[/repos?Signature=hush"},
        *({"status": status} for status in (403, 404, 416, 503)),
        {"cut": 0, "reset": True},
        {"stall": 0},
        {"flip": 100},
        {"longer": 1000},
    ],
    ids=str,
)
def test_no_failure_shows_the_token_or_a_signature(hub, monkeypatch, capfd, fault):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(prepare.STREAM, "timeout", 0.2)
    hub.fail(times=ALWAYS, **fault)
    with pytest.raises(SystemExit) as stopped:
        prepare.download(shard_path(), climbmix())
    seen = "".join(traceback.format_exception(stopped.value))
    seen += "".join(capfd.readouterr())
    for path in prepare.cache_root().rglob("*"):
        seen += path.read_bytes().decode("latin-1") if path.is_file() else path.name
    assert "N0tForYourEyes" not in seen
    assert "Signature=" not in seen


# A corpus of shards -----------------------------------------------------------------------------


def write_shard(path, texts):
    pq.write_table(pa.table({"text": texts}), path, compression="none")
    return path.read_bytes()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, folder):
    """Three small shards of real text; one document stands in all of them."""
    path, files = tmp_path_factory.mktemp("shards") / "shard.parquet", {}
    texts = [file.read_text() for file in sorted((folder / "algorithms").glob("*.py"))]
    texts = [text for text in texts if text]
    for i, name in enumerate((FIRST, SECOND, VAL)):
        files[name] = write_shard(path, [texts[-1], *texts[5 * i : 5 * i + 5]])
    return files


@pytest.fixture
def full_hub(hub, shards):
    hub.files |= shards
    return hub


def state(directory):
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()
    }


def test_shards_become_a_corpus_and_are_needed_only_until_then(full_hub):
    corpus = climbmix(2)
    prepare.prepare(corpus)
    for name in (FIRST, SECOND, VAL):
        assert shard_path(name).read_bytes() == full_hub.files[name]
        shard_path(name).unlink()
    full_hub.requests.clear()
    prepare.prepare(corpus, thorough=True)
    assert not full_hub.requests
    x, y, _ = next(prepare.make_dataloader(prepare.Tokenizer(corpus), 2, 2048, "train"))
    assert x.shape == y.shape == (2, 2048)


def test_more_shards_leave_tokens_and_shards_that_are_there_alone(full_hub):
    prepare.prepare(climbmix(1))
    tokens, raw = state(climbmix(1).directory), state(shard_path().parent)
    digest = prepare.harness_digest(climbmix(1))
    full_hub.requests.clear()
    prepare.prepare(climbmix(2))
    assert {request.name for request in full_hub.requests} == {SECOND}
    now = state(climbmix(2).directory)
    assert now.keys() - tokens.keys() == {"train_00001.tokens"}
    assert all(now[name] == tokens[name] for name in tokens if name != "manifest.json")
    assert raw.items() <= state(shard_path().parent).items()
    assert prepare.harness_digest(climbmix(1)) == digest != prepare.harness_digest(climbmix(2))


def test_fewer_shards_find_their_tokens_and_make_nothing(full_hub):
    prepare.prepare(climbmix(2))
    before = state(climbmix(2).directory)
    prepare.prepare(climbmix(1), thorough=True)
    prepare.prepare(climbmix(2), thorough=True)
    assert state(climbmix(2).directory) == before


def test_no_document_of_the_validation_shard_is_trained_on(full_hub):
    corpus = climbmix(2)
    prepare.prepare(corpus)
    tokenizer = prepare.Tokenizer(corpus)
    held_out = set(prepare.read_documents(shard_path(VAL)))
    trained = set()
    for ids, epoch in prepare.train_documents(corpus, 1, (0, 1)):
        if epoch == 2:
            break
        trained.add(tokenizer.decode(ids[1:].tolist()))
    given = {*prepare.read_documents(shard_path()), *prepare.read_documents(shard_path(SECOND))}
    assert given & held_out
    assert trained == given - held_out


@pytest.mark.parametrize(("asked", "given"), [(None, 10), (1, 1), (6542, 6542), (-1, 6542)])
def test_the_validation_shard_comes_with_as_many_training_shards_as_asked_for(asked, given):
    names = prepare.shard_names(climbmix(asked))
    assert names == [VAL, *(f"shard_{number:05d}.parquet" for number in range(given))]


@pytest.mark.parametrize("asked", [0, -2, 6543, 99999])
def test_no_other_number_of_shards_can_be_asked_for(asked):
    with pytest.raises(SystemExit, match=rf"--shards {asked} with climbmix: .*1 to 6542 \(-1: all"):
        climbmix(asked)


# What comes is data -----------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "source"])
def test_a_shard_that_is_code_is_refused_and_does_not_run(full_hub, tmp_path, kind):
    code = {
        "pickle": pickle.dumps(Trap(tmp_path / "sprung")),
        "source": b"import os; os.mkdir('x')",
    }
    full_hub.files[FIRST] = code[kind]
    with pytest.raises(SystemExit, match=rf"{FIRST}: expected a parquet file with strings"):
        prepare.prepare(climbmix())
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_the_schema_of_a_shard_is_not_opened(tmp_path):
    trap, path = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "shard.parquet"
    names = (b"ARROW:extension:name", b"ARROW:extension:metadata")
    kind = dict(zip(names, (b"arrow.py_extension_type", trap), strict=True))
    schema = pa.schema([pa.field("text", pa.string(), metadata=kind)], metadata=kind)
    pq.write_table(pa.table([pa.array(["a", "b"])], schema=schema), path)
    assert list(prepare.read_documents(path)) == ["a", "b"]
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pq.read_schema(path).field("text").metadata[names[1]])
    assert (tmp_path / "sprung").exists()  # it would have worked


def test_the_judge_has_no_means_to_run_what_it_reads():
    for name in ("prepare.py", "harness/run.py", "harness/record.py"):
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        imported = {
            a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
        }
        assert not imported & {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "cloudpickle",
            "joblib",
            "runpy",
        }
        assert not calls & {"eval", "exec", "compile", "__import__", "torch.load", "np.load"}
