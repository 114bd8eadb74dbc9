"""Alerts to prompts: 100 messages that the tables were made for, 40 that were written before
them, single traps, and sample.py --alert. A wrong picture is worse than none: there must be none."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
from hanokdiff import alert
from hanokdiff.formats import embedding_file

HERE = Path(__file__).parent
FIRE = "[행정안전부] 오늘 14:20 전주 한옥마을 화재 발생. 인근 주민은 대피 바랍니다"


pytestmark = pytest.mark.usefixtures("elsewhere")


def messages(name: str) -> list[tuple[str, tuple]]:
    """(message, expected reading) of each row of a table of kind, disaster, place, time, text."""
    with open(HERE / name, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len({row["text"] for row in rows}) == len(rows)

    def expected(row):
        return row["kind"], set(row["disaster"].split("+")) - {"-"}, row["place"], row["time"]

    return [(row["text"], expected(row)) for row in rows]


def reading_of(text: str) -> tuple:
    r = alert.read(text)
    return r.kind, set(r.disaster), r.place or "-", r.time or "-"


def wrong_picture(text: str, expected: tuple) -> bool:
    """Something is drawn that is not meant."""
    kind, disaster, *_ = reading_of(text)
    return kind == "alert" and (expected[0] != "alert" or not disaster <= expected[1])


@pytest.mark.parametrize("name, count, share", [("alerts.tsv", 100, 1.0), ("alerts_held_out.tsv", 40, 0.95)])
def test_messages(name, count, share):
    rows = messages(name)
    assert len(rows) == count and {e[0] for _, e in rows} == {"alert", "drill", "all-clear", "unknown"}
    missed = [(text, expected, reading_of(text)) for text, expected in rows if reading_of(text) != expected]
    assert len(missed) <= round(count * (1 - share)), missed
    assert not [text for text, expected in rows if wrong_picture(text, expected)]


def test_the_two_sets_share_no_message():
    one, two = ({text for text, _ in messages(name)} for name in ("alerts.tsv", "alerts_held_out.tsv"))
    assert not one & two


@pytest.mark.parametrize("text", [
    "경주 불국사 관람시간 안내", "화재동 주민센터 이전", "홍수동 축제 개최", "설악산 단풍 절정",
    "눈 건강검진 받으세요", "가수 비 공연 예매",
    "강릉 강문동 강변 산책로 개통", "문화재 보수공사로 통제", "태풍의 눈 전시회", "공연 일정 연기 안내",
    "행사 연기로 인한 환불", "부산불꽃축제 교통 통제",
    "대책 방침수립 회의 통제", "지침수정 발령", "상황사진 접수", "예산불용 방지", "확대설치 발령",
    "길이 미끄러지진 않습니다. 통제", "폭발적 인기로 통제",
    "화재보험 만기 안내 접수", "국민재난안전포털 점검", "지진 대피소 위치 확인",
    "홍수 피해 주민 임시주거시설 안내",
    "산불감시원 모집 접수",
    "산불 조심 기간입니다", "산불 조심하세요. 입산 시 화기 소지 금지", "화재 예방을 위해 전원을 꺼 주세요",
    "산불 예방 위해 입산 통제", "불조심 강조의 달",
    "화재 위험이 높으니 소각을 금지합니다", "지진 발생 시 책상 아래로 대피하세요", "불이 나면 대피하세요",
    "지진이 발생했을 때 대피 요령",
    "한옥마을에서 화재가 발생하지 않도록 주의", "산불 피해 주민 돕기 성금 모금", "지진 10주년 추모식",
    "화재로 소실된 숭례문 복원 기념행사",
    "폭우 대비 배수로 점검하세요", "건조특보 발효 중, 화재 예방에 유의", "", " ", "🔥", "fire in the hanok",
])  # fmt: skip
def test_no_disaster_where_none_is_meant(text):
    assert alert.read(text).kind == "unknown"


@pytest.mark.parametrize("text, kind", [
    ("소방훈련: 한옥마을 화재 발생", "drill"), ("지진 대피훈련 중입니다. 대피하세요", "drill"),
    ("화재 발생을 가정한 상황입니다", "drill"),
    ("산불 발생. 실제 상황이 아닙니다", "drill"), ("재난문자 테스트입니다. 지진 발생", "drill"),
    ("훈련이 아닙니다. 한옥마을 화재 발생", "alert"), ("[실제상황] 지진 발생", "alert"),
    ("훈련소 인근 산불 발생", "alert"),
    ("피아노 연습실 화재 발생", "alert"), ("가정집 화재 발생", "alert"),
    ("한옥마을 화재 아님", "all-clear"), ("한옥마을 화재, 오인 신고로 확인", "all-clear"),
    ("규모 2.3 지진, 피해 없음", "all-clear"),
    ("화재 발생. 14:30 진화 완료", "all-clear"), ("[상황 종료] 공장 화재", "all-clear"),
    ("폭염주의보 해제", "all-clear"),
    ("공장 화재 발생했으나 상황 종료", "all-clear"), ("산불 주불 진화 완료, 잔불 정리", "all-clear"),
    ("화재 발생, 인명피해 없음. 진화 중", "alert"), ("산불 진화율 90%, 주불 진화 중", "alert"),
    ("화재 진화 완료 예정", "alert"),
    ("호우경보 발효. 해제 시까지 출입 금지", "alert"), ("폭설로 항공편 취소", "alert"),
    ("산불 진화 완료되었으나 재발화하여 확산", "alert"),
    ("학생 전원 대피 완료. 학교 화재 발생", "alert"), ("태풍 예보", "alert"),
    ("내일 많은 눈이 내릴 전망", "alert"),
])  # fmt: skip
def test_drills_and_ends(text, kind):
    assert alert.read(text).kind == kind


@pytest.mark.parametrize("text, expected", [
    ("태풍으로 도로 침수", ("typhoon", "flood")), ("호우경보 해제, 산사태경보 유지", ("landslide",)),
    ("호우경보, 산사태 우려", ("heavy rain",)), ("호우·강풍주의보 발효", ("heavy rain", "strong wind")),
    ("지진해일주의보 발령", ("tsunami",)), ("지진 발생, 지진해일 우려 없음", ("earthquake",)),
    ("야산 화재 발생", ("wildfire",)),
    ("공장 화재로 검은 연기 발생", ("fire",)), ("공장에서 검은 연기 발생", ("smoke",)),
    ("산사태 우려, 즉시 대피", ("landslide",)),
    ("문화재화재 발생", ("fire",)), ("설악산 산사태 발생", ("landslide",)),
    ("태풍 '매미' 북상", ("typhoon",)),
    ("태풍급 강풍 예상", ("strong wind",)),
    ("하회마을 고택에서 불이 나 연기가 확산 중입니다", ("fire",)),
    ("집중호우로 하천이 범람하여 외암마을 한옥이 침수되고 있습니다", ("heavy rain", "flood")),
])  # fmt: skip
def test_several_disasters(text, expected):
    assert alert.read(text).disaster == expected


@pytest.mark.parametrize("text, expected", [
    ("[기상청] 02:20 서산시 인근 시간당 72mm 이상 매우 강한 비, 침수와 하천 범람에 유의하시기 바랍니다",
     ("heavy rain - night")),
    ("매우 강한 비가 내리고 있습니다. 저지대 침수와 하천 범람에 유의 바랍니다", "heavy rain - -"),
    ("침수와 하천 범람에 유의하세요", "- - -"),
    ("시간당 50mm 강한 비 지속. 산사태 위험지역 주민은 사전 대피 바랍니다", "heavy rain - -"),
    ("강한 비와 함께 돌풍·천둥·번개가 예상되오니 시설물 관리에 유의", "heavy rain+lightning+strong wind - -"),
    ("밤사이 많은 눈으로 도로 결빙이 예상되오니 감속 운행 바랍니다", "heavy snow+icy road road night"),
    ("댐 방류량 증가로 하천 수위가 급격히 상승하고 있으니 하천 접근 금지", "flood river -"),
    ("[남양주시] 왕숙천 진관교 홍수경보 발령, 하천변 출입 금지", "flood river -"),
    ("하천 범람 우려, 하천변 주민은 즉시 대피", "flood river -"),
    ("호우경보 발효, 한옥마을 침수 우려", "heavy rain hanok -"),
    ("제11호 태풍 북상 중. 남해안은 강풍과 폭우 예상", "heavy rain+strong wind+typhoon coast -"),
    ("20시 현재 대설특보 발효 중. 빙판길 안전에 주의하세요", "heavy snow - night"),
    ("아침 최저기온 영하 18도 한파. 수도계량기 동파에 유의 바랍니다", "cold - morning"),
    ("14:29 포항시 북구 북쪽 9km 지역 규모 5.4 지진 발생/낙하물 주의", "earthquake - day"),
    ("15:20 서귀포시 서남서쪽 41km 해역 규모 4.9 지진 발생. 지진해일에 주의", "earthquake coast day"),
    ("산림청] 오늘 06:00 경북 전역 산사태 위기경보 '심각' 발령. 산지 야외활동 금지", "landslide - morning"),
    ("북촌 한옥마을에서 실종된 김순자씨(여, 78세)를 찾습니다. 비 오는 날 실종, 검은 점퍼 ☎182", "- - -"),
    ("민방위 공습경보 발령. 지하대피소로 대피하세요", "- - -"),
    ("[남원시] 한옥마을 일원 정전. 복구 작업 중", "- - -"),
])  # fmt: skip
def test_kinds_of_alerts(text, expected):
    """The wording of real alerts of many kinds: disasters, place and time, - where there is none."""
    kind, disasters, place, time = reading_of(text)
    assert " ".join(["+".join(sorted(disasters)) or "-", place, time]) == expected
    assert (kind == "alert") == bool(disasters)


@pytest.mark.parametrize("text, place", [
    ("한옥마을 화재 발생", "hanok"), ("한옥마을 내 주택 화재 발생", "hanok"),
    ("한옥마을 인근 주택 화재 발생", "house"), ("한옥마을 인근 야산 산불 발생", "mountain"),
    ("화재 발생, 한옥마을 전체 통제", "hanok"), ("화재 발생. 한옥마을 주차장으로 대피", None),
    ("호우경보 발효. 하천변 접근 금지", None),
    ("[한국도로공사] 폭설로 통제", None), ("부산 전역 호우경보", None), ("울산 산불 발생", None),
    ("인천 침수 발생", None), ("파주시(비룡대교) 임진강 홍수경보", "river"),
    ("상남교차로 인근 고물상에서 화재 발생", None), ("불국사에서 화재 발생", "temple"),
])  # fmt: skip
def test_place(text, place):
    reading = alert.read(text)
    assert (reading.kind, reading.place) == ("alert", place)


@pytest.mark.parametrize("when, time", [
    ("14:20", "day"), ("02시 10분", "night"), ("오후 8시", "night"), ("오전 9시", "morning"),
    ("새벽 3시", "night"),
    ("밤 12시", "night"),
    ("낮 12시", "day"), ("낮 2시", "day"), ("저녁 6시", "evening"), ("오전 12시", "night"),
    ("24:00", "night"),
    ("정오", "day"), ("오늘 밤", "night"),
    ("19:10~23:00", "evening"), ("05:10 접수, 10:30 현재", "morning"), ("18시까지", None), ("24시간", None),
    ("낮은 지대", None), ("25:99", None),
    ("☎ 063-281-2114", None), ("119 신고", None), ("3.21.", None),
])  # fmt: skip
def test_time_of_day(when, time):
    assert alert.read(f"{when} 한옥마을 화재 발생").time == time


def test_korean_in_parts_reads_the_same():
    expected = ("alert", {"fire"}, "hanok", "day")
    assert reading_of(unicodedata.normalize("NFD", FIRE)) == reading_of(FIRE) == expected


WORDS = """화재 발생 진화 완료 훈련 해제 산불 침수 태풍 한옥마을 14:20 오후 낮 없음 우려 대피 , . ( ) [ ] ☎"""


SENTENCES = st.lists(st.sampled_from([*WORDS.split(), "\n"]), max_size=15).map(" ".join)


@given(st.text(max_size=80) | SENTENCES)
@settings(max_examples=300, deadline=None)
def test_every_text_has_a_reading(text):
    reading = alert.read(text)
    assert (reading.kind == "alert") == bool(reading.disaster)
    if reading.kind == "alert":
        english, _ = alert.prompt(reading)
        assert english and "{" not in english and english.isascii()


def test_every_disaster_and_place_has_english():
    for disaster in alert.DISASTERS:
        for place in (*alert.PLACES, None):
            english, notes = alert.prompt(alert.Reading("", "alert", (disaster,), place, "night"), "sks")
            assert english.endswith(", at night") and not notes
            assert english.count("sks") == (place == "hanok") and english.isascii()


def test_the_tiny_worlds_prompt_has_only_words_that_it_knows():
    known = alert.tiny_words()
    assert {"fire", "smoke", "snow", "night", "flood", "daytime", "building"} <= known
    drawn = set()
    for disaster in alert.DISASTERS:
        reading = alert.Reading("", "alert", (disaster,), "factory", "evening")
        try:
            english, notes = alert.prompt(reading, "*", known)
        except ValueError as e:
            assert disaster in str(e) and "--model" in str(e)
            continue
        drawn.add(disaster)
        assert not alert.unknown(english, known) and "a building" in english
        assert "factory" in notes[0] and "evening" in notes[1]
    assert drawn == {"fire", "smoke", "flood", "heavy snow"}
    both = alert.Reading("", "alert", ("typhoon", "flood"), "hanok", "night")
    english, [note] = alert.prompt(both, "*", known)
    assert english == "a flood around *, at night" and "typhoon" in note
    assert alert.prompt(both, "*")[0] == "a typhoon hitting *, flood, at night"


def test_without_a_pseudo_word_the_hanok_is_named_with_a_note():
    english, [note] = alert.prompt(alert.read(FIRE), None)
    assert english == "a Korean traditional house on fire, in the daytime" and "untouched" in note


@pytest.mark.parametrize("text, more, expected", [
    (FIRE, [], dict(kind="alert", disaster=["fire"], place="hanok", time="day",
                    prompt="* on fire, in the daytime",
                    notes=[])),
    (FIRE, ["--token", "sks"], dict(prompt="sks on fire, in the daytime")),
    (FIRE, ["--token", ""], dict(prompt="a Korean traditional house on fire, in the daytime")),
    ("울산 지진 발생", [], dict(disaster=["earthquake"], place=None, time=None,
                          notes=["no kind of place found", "no time of day found"])),
    ("소방훈련 안내", [], dict(kind="drill", disaster=[], prompt=None)),
    ("안녕하세요", [], dict(kind="unknown", prompt=None, notes=["no disaster found"])),
])  # fmt: skip
def test_command_line_prints_one_line_of_json(text, more, expected, capsys):
    assert alert.main([text, "--json", *more]) == 0
    [line] = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert row["alert"] == text and expected.items() <= row.items()


def test_command_line_prints_two_lines(tmp_path, capsys):
    """With the word of the run that is named, of --token, or "*"."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text('{"token": "sks"}')
    hanok = "alert: fire; place: hanok; time: day\nprompt: {} on fire, in the daytime\n"
    for more, word in (([], "*"), (["--token", "gate"], "gate"), *((["--adapter", str(run / f)], "sks")
                       for f in ("", "model", "lora.safetensors"))):  # fmt: skip
        assert alert.main([FIRE, *more]) == 0 and capsys.readouterr().out == hanok.format(word)
    assert alert.main(["울산 지진 발생"]) == 0
    assert capsys.readouterr().out == (
        "alert: earthquake; place: not named; time: not named\nprompt: an earthquake damaging a building\n"
    )
    assert alert.main(["소방훈련 안내"]) == 0
    assert capsys.readouterr().out == "drill: this is a drill or a test\nno prompt: nothing is to be drawn\n"
    for more in (["--adapter", "nowhere"], ["--adapter", str(run), "--token", "a"]):
        assert alert.main([FIRE, *more]) == 2 and "--token" in capsys.readouterr().err


def test_a_terminal_without_korean_gets_ascii(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="cp1252") as out:
        monkeypatch.setattr("sys.stdout", out)
        alert.main(["🔥 " + FIRE, "--json"])
    written = (tmp_path / "out").read_text("ascii")
    assert json.loads(written)["alert"] == "🔥 " + FIRE


def draw(*argv) -> int:
    return sample.main([*map(str, argv), "--steps", "2", "--device", "cpu", "--out", "out"])


def pictures() -> list[dict]:
    return [Image.open(f).text for f in sorted(Path("out").glob("0*.png"))]


def test_an_alert_is_drawn_and_its_reading_kept(tmp_path, capsys):
    embedding_file.save_file(tmp_path / "gate.safetensors", "Gate", torch.randn(1, 72))
    assert draw("--alert", FIRE, "--n", 2, "--embedding", tmp_path / "gate.safetensors") == 0
    out = capsys.readouterr().out
    texts = pictures()
    assert [t["parameters"].partition("\n")[0] for t in texts] == ["Gate on fire, in the daytime"] * 2
    row = json.loads(texts[0]["alert"])
    assert "alert: fire; place: hanok; time: day\nprompt: Gate on fire, in the daytime\n" in out
    assert texts[0]["alert"] == texts[1]["alert"]
    assert (row["kind"], row["disaster"], row["place"], row["time"]) == ("alert", ["fire"], "hanok", "day")
    assert row["alert"] == FIRE and row["prompt"] == "Gate on fire, in the daytime"


def test_without_an_artefact_the_prompt_has_only_known_words():
    assert draw("--alert", FIRE) == 0
    [text] = pictures()
    row = json.loads(text["alert"])
    assert row["prompt"] == "a building on fire, in the daytime" and len(row["notes"]) == 2


def test_a_prompt_is_no_alert():
    assert draw("a barn on fire") == 0
    assert "alert" not in pictures()[0]


@pytest.mark.parametrize("argv, words", [
    (["--alert", "[훈련] 한옥마을 화재 발생"], ["drill", "훈련"]),
    (["--alert", "한옥마을 화재 진화 완료"], ["all-clear", "fire"]),
    (["--alert", "안녕하세요"], ["no disaster found in", "안녕하세요"]),
    (["--alert", ""], ["no disaster found"]),
    (["--alert", "산불 조심 기간"], ["wildfire", "nothing says"]),
    (["--alert", "울산 지진 발생"], ["tiny world", "earthquake", "--model"]),
    (["--alert", FIRE, "a barn"], ["--alert", "leave out"]),
    ([], ["nothing to draw: give a prompt, or --alert TEXT"]),
])  # fmt: skip
def test_refused_in_one_sentence(argv, words, capsys):
    assert draw(*argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert not Path("out").exists()


def test_two_learnt_words_need_a_choice(tmp_path, capsys):
    for word in ("Gate", "Roof"):
        embedding_file.save_file(tmp_path / f"{word}.safetensors", word, torch.randn(1, 72))
    both = ["--embedding", tmp_path / "Gate.safetensors", "--embedding", tmp_path / "Roof.safetensors"]
    assert draw("--alert", FIRE, *both) == 2
    error = capsys.readouterr().err
    assert "Gate" in error and "Roof" in error and "--token" in error and not Path("out").exists()
    assert draw("--alert", FIRE, *both, "--token", "Roof") == 0
    assert pictures()[0]["parameters"].startswith("Roof on fire")
