"""The words of Korean disaster alerts, as regular expressions, in tables that alert.py reads.

In a table's pattern, white space separates alternatives and "_" is a space that may be missing (`either`).
"""


def either(patterns: str) -> str:
    """One pattern of alternatives that are separated by white space; "_" is a space that may be missing."""
    return "|".join(patterns.split()).replace("_", " ?")


# -------------------------------------------------------------------------------- disasters
# name: (the prompt, in the tiny world's own sentences where it has one; the Korean words)

DISASTERS = {
    "wildfire": ("a forest fire near {place}", r"산불 들불 (?:야산|임야|산림)\S{0,3}_(?:화재|불이(?=_나))"),
    "fire": ("{place} on fire", r"화재 큰불 불이(?=_(?:나|났|붙)) 불길 화염"),
    "smoke": ("smoke rising from {place}", r"""
        (?:검은|짙은|다량의?|유독)_연기 연기(?=_(?:발생|확산|유입|가|로_인))"""),
    "flood": ("a flood around {place}", r"""
        침수 범람 홍수 급류 수위[가도]?_(?:급격히_|급)?(?:상승|증가) 물(?=에_잠|_차오|이_차오)
        제방_(?:유실|붕괴)"""),
    "heavy rain": ("heavy rain falling on {place}", r"""
        호우 폭우 장대비 물폭탄 (?:많은|강한|거센)_비(?=[가와로,.·/\s]|$)"""),
    "heavy snow": ("{place} covered with snow", r"대설 폭설 (?:많은|강한|함박)_눈(?=[이과,.·/\s]|으로|$)"),
    "icy road": ("{place} covered with ice", r"결빙 빙판 살얼음 블랙아이스"),
    "typhoon": ("a typhoon hitting {place}", r"태풍(?!급)"),
    "strong wind": ("strong wind around {place}", r"강풍 돌풍 (?:강한|거센)_바람"),
    "high waves": ("high waves hitting {place}", r"풍랑 너울 폭풍해일 (?:높은|거센|거대한)_(?:파도|물결)"),
    "tsunami": ("a tsunami hitting {place}", r"지진_해일 쓰나미"),
    "earthquake": ("an earthquake damaging {place}", r"지진(?!_[않못]) (?<![가-힣])여진"),
    "landslide": ("a landslide near {place}", r"""
        산사태 토석류 낙석 토사_(?:유출|유입|붕괴) (?:비탈|사면|옹벽)\S{0,2}_붕괴"""),
    "lightning": ("lightning over {place}", r"낙뢰 벼락 번개"),
    "hail": ("hail falling on {place}", r"(?<![가-힣])우박"),
    "heat": ("{place} under the hot summer sun, heat haze", r"폭염 무더위(?!_쉼터) 불볕더위"),
    "cold": ("{place} in extreme cold, frost and ice", r"한파 강추위"),
    "fine dust": ("{place} in thick yellow dust", r"미세_먼지 황사"),
    "fog": ("{place} in thick fog", r"안개"),
    "explosion": ("an explosion at {place}", r"폭발(?!적)"),
    "chemical leak": ("a leak of toxic gas at {place}", r"""
        (?:가스|물질|불산|염산|황산|염소|암모니아|화학\S{0,3})_(?:누출|유출)"""),
    "collapse": ("{place} collapsed into ruins", r"붕괴 무너(?:져|졌|짐)"),
    "sinkhole": ("a sinkhole in {place}", r"싱크홀 (?:지반|도로)_침하 땅_꺼짐"),
    "crash": ("a car crash at {place}", r"교통사고 추돌"),
}  # fmt: skip
ABSORBS = {  # what is not drawn beside it
    "wildfire": {"fire", "smoke"}, "fire": {"smoke"}, "explosion": {"smoke"}, "tsunami": {"earthquake"},
}  # fmt: skip
AT_SEA = ("high waves", "tsunami")  # on a coast, where no place is named

# -------------------------------------------------------------------------------- places and times

MOUNTAINS = """설악 지리 한라 북한 도봉 관악 인왕 북악 수락 불암 청계 감악 마니
    치악 오대 태백 소백 함백 월악 속리 계룡
    대둔 덕유 내장 모악 무등 월출 조계 팔공 비슬 가야 주왕 토함 신불 금정 황령 운문 화왕 천성 두타 명지
    화악"""
RIVERS = """한강 낙동강 금강 영산강 섬진강 임진강 북한강 남한강 형산강 태화강 만경강 남강 한탄강 내성천 청계천
    탄천"""
TOWNS = "부천 인천 순천 춘천 제천 이천 포천 과천 김천 사천 영천 홍천 연천 화천 옥천 진천 서천 합천 예천"
TEMPLES = "불국 해인 낙산 통도 송광 화엄 법주 부석 수덕 월정 직지 고운 운람 조계 봉정 범어 마곡"
PLACES = {
    "hanok": ("a Korean traditional house", r"""
        한옥(?:마을)? 고택 종가_집 종택 기와집 초가 서원(?![가-힣]) 향교 낙안읍성 선교장
        (?:하회|양동|외암|왕곡)마을"""),
    "palace": ("a Korean palace", r"경복궁 창덕궁 창경궁 덕수궁 경희궁 고궁 숭례문"),
    "temple": ("a Korean Buddhist temple", rf"사찰 암자 (?:{either(TEMPLES)})사"),
    "underpass": ("an underpass", r"지하_차도 굴다리"),
    "tunnel": ("a road tunnel", r"터널"),
    "bridge": ("a bridge", r"[가-힣]{1,4}대교 교량 다리(?=_위)"),
    "station": ("a subway station", r"""
        지하철역
        (?<![가-힣])[가-힣]{2,5}역(?<!지역|전역|구역|해역|방역|광역|영역|수역|권역)(?=[\s에]|$)"""),
    "apartment": ("an apartment building", r"아파트 오피스텔 주상복합 빌라(?![가-힣]) 연립주택 다세대"),
    "factory": ("a factory", r"공장 산단 산업단지 공단 제련소 발전소"),
    "warehouse": ("a warehouse", r"창고 물류_센터"),
    "market": ("a Korean street market", r"시장(?!님|실|_주재|_지시)"),
    "school": ("a school", r"학교 유치원 어린이집"),
    "hospital": ("a hospital", r"병원 요양원"),
    "farm": ("a farm", r"농경지 비닐하우스 축사 농장 양계장 돈사 우사 논밭"),
    "road": ("a road", r"고속도로 국도 지방도 도로 나들목 (?<!교)차로 [가-힣]{2,4}대로"),
    "river": ("a river", rf"""
        하천 강변 하류 계곡 댐_방류 (?<![가-힣])(?:{either(RIVERS)})(?![가-힣])
        (?<![가-힣])(?!{either(TOWNS)})[가-힣]{{1,3}}천(?=_(?:범람|수위|상류|산책로|일대|일원))
        (?<![가-힣])(?!{either(TOWNS)})[가-힣]{{1,3}}[강천](?=_(?:범람|수위|홍수|[가-힣]{{2,4}}교(?![가-힣])))"""),
    "coast": ("a coast", r"""
        해안 해변 해수욕장 해역 앞바다 해상 바닷가 방파제 갯바위 선착장
        (?<![가-힣])[가-힣]{2,3}항(?<!공항|사항)(?=_(?:등|인근|일대|앞|에|내))"""),
    "mountain": ("a mountain", rf"""
        야산 뒷산 임야 등산로 산자락 산기슭 산중턱 국립공원 (?<![가-힣])산_\d+(?=-|번지|_일원|_일대)
        (?<![가-힣])(?:{either(MOUNTAINS)})산(?![동읍면로]) [가-힣]{1,4}봉(?=_(?:등산|정상|일대))"""),
    "house": ("a house", r"주택 가옥 (?<![가-힣])민가"),
    "building": ("a building", r"건물 상가 빌딩 호텔 모텔 고시원"),
    "village": ("a village", r"마을(?!_(?:회관|주민))"),
}  # fmt: skip
GENERIC = ("house", "building", "village")  # a special place just before wins: "한옥마을 내 주택"
ANYWHERE = "a building"  # where no kind of place is named: a word that both models know

NIGHT, MORNING, DAY, EVENING = "night", "morning", "day", "evening"
TIMES = {NIGHT: "at night", MORNING: "in the morning", DAY: "in the daytime", EVENING: "in the evening"}
HOURS = [NIGHT] * 6 + [MORNING] * 5 + [DAY] * 6 + [EVENING] * 3 + [NIGHT] * 5  # 0 to 24 o'clock
PARTS = {
    "새벽": NIGHT, "심야": NIGHT, "야간": NIGHT, "자정": NIGHT, "밤": NIGHT, "아침": MORNING, "오전": MORNING,
    "정오": DAY, "낮": DAY, "오후": DAY, "저녁": EVENING,
}  # fmt: skip
PART = either("""
    새벽 심야 야간(?!_(?:관람|경기|개장)) 자정 (?<!군)밤(?![나골섬송]) 아침 오전 정오 낮(?![은아게추춰습])
    오후 저녁""")
CLOCK = either(r"(?<![\d:.])(?:[01]?\d|2[0-4])(?=:[0-5]\d(?!\d)|_시(?![간장청민내외설작점]))")

# -------------------------------------------------------------------------------- is it meant, and now?

NOT_YET = "(?!_(?:시|될|되는|할|예정|전|까지))"  # "해제 시까지": until it is over
NOT_MEANT = either(r"""
    https?://\S+ ☎_[\d-]+ 0\d{1,2}-\d{3,4}-\d{4} 1[5-8]\d\d-\d{4}
    [\[(【<][^\])】>\d]{0,20}(?:[시군구도청부서소]|공사|공단|본부|센터|㈜)[\])】>] \([^)]{0,20}교\)
    \S{0,9}(?:소방서|소방청|홍수통제소|산림청|기상청|유산청|해양경찰서|도로공사|도로교통공단)
    (?:화재|홍수|산불|지진|태풍|대설|폭설|침수|범람|호우|강풍)(?:동|리|읍|역|마을|초등학교|대피소)(?![가-힣])
    (?:행사|공연|일정|개최|경기|시험|축제|관람)\S{0,2}_(?:\S{1,6}_)?연기 태풍의_눈
    (?:화재|재난|산불)_(?:보험|감지기|경보기) 국민재난안전포털 문화재 산불꽃
    [생재예출계]산불 [방지]침수 [상선]호우 [확최증거막]대설 [러어꺼커퍼려]지진
    [강대]한파도 [상당]황사""")
NO_DRILL = either(r"""
    훈련\S{0,3}_(?:아님|아닙니다|아니) 실제_상황(?:입니다|임) 훈련(?:장|소|병|기)(?![가-힣])
    (?:사격|비행|행군)_훈련(?=_중|장)""")
DRILL = either(r"""
    훈련 연습(?![생실장]) 모의(?!고사) 도상 가상_(?:상황|화재|훈련|재난) 시험_(?:발송|송출|방송|문자|운영)
    (?:송출|발송|수신|통신|문자)_테스트 테스트_(?:문자|입니다|중) (?:상황|발생)을?_가정
    실제\S{0,2}_(?:상황\S{0,2}_)?아[니닙님]""")
OVER = either(rf"""
    해제{NOT_YET} (?:상황|특보|경보|주의보|화재|산불|(?:통제|진화|진압)\S{{0,2}})_종료{NOT_YET} 완진{NOT_YET}
    (?:진화|진압|복구|수습)[가이를]?_(?:됨|되었|됐|했|완료{NOT_YET}) 주불\S{{0,2}}_(?:잡|진화_완료) 꺼졌 소멸
    통행_재개
    정상_(?:통행|소통|운행|화) 안심하 아님 아닙니다 아니(?:므로|오니|며|라) 아닌_것 오인 오보 허위 오작동
    사실_무근
    오발송 발생하지_않았 잘못_(?:발송|보[낸내]|전송) (?:경보|주의보|특보|발령)\S{{0,2}}_취소
    (?<!인명)(?<!인명\s)(?:우려|가능성|위험|영향|피해|이상|확산)[은는이가도]?_없""")
AGAIN = either("재발화 재확산 다시_(?:발생|번|확산|발령|발효) (?:주의보|경보)로_(?:대체|변경|격상|하향)")
ALL_OVER = either(rf"""
    ^\W*(?:상황_종료|특보_해제|해제) 상황\S{{0,2}}_종료{NOT_YET}
    (?:모두|전면|일괄|대피\S{{0,3}})_해제{NOT_YET}""")
OTHER_NEWS = either("""
    캠페인 교육 체험 모집 채용 지원금 성금 모금 보상 포상 추모 주년 주기 기념 전시(?!관|장) 박람 홍보 복원
    도입""")
ADVICE = either(r"""
    예방 조심_(?:기간|하) 대비(?!_태세) 수칙 요령 점검 원인_조사 감식 방지 방재 감시 발생_시(?=[\s,에는엔])
    ^_시(?=[\s,에]) 않도록 발생하?지_않 발생을?_(?:막|줄) ^_나면 ^_났을_때 ^_상황에선 없는
    (?:발생|확산|진화)\S{0,3}_할?_?(?:때|경우) 발생\S{0,3}_수_있 커지면
    피해\S{0,2}_(?:주민|농가|복구|지원|신고)
    로_(?:이어|번질_수|오인|착각|확대될_수)""")
RISK = either(r"(?:(?:사고|발생\S{0,2})_)?(?:우려|위험|가능성) 주의(?!보) 유의 조심")
EVENT = either(r"""
    ^_(?:[.!,/(~\d:·]|$) ^[이가]?_으?로(?!_(?:이어|번질)) 주의보 경보 특보 발생 발효 발령 확산 번[지져졌] 진화
    진압
    연소 접수 예상 예보 전망 북상 상륙 접근 근접 영향 통제 금지 고립 매몰 사고 동반 내리 내렸 쌓
    대피(?!소|로|요령)
    이동 현재 유지 지속(?!적) 대응 진입 우회 구간 감지 관측 타고 시행 추가 중(?![가-힣]) 중[이입인]
    ^_(?:났|붙|나(?=[\s,서며고]|$))
    ^(?:에|이)?_(?:잠|차오) ^(?:되|하)고_있 ^(?:하여|됐|되어|되었(?!던))""")
ACTION = either("대피(?!로|요령) 발령 발효 통제 고립 중단 서행 피하 벗어나")
ELSEWHERE = either(r"""
    ^[^.!\n]{0,25}?(?:접근|출입|통행|이용|진입|작업|입산|입수)\S{0,3}_(?:금|자제|삼가|하지_마|유의|통제)
    ^(?!\S*(?:방향|쪽))[^.,!\n]{0,12}?로_(?:즉시_|신속히_)?(?:대피|이동|피하|피신)
    ^[^.,!\n]{0,8}(?:탐방객|등산객|야영객|피서객) ^[^.,!\n]{0,8}?(?:벗어나|하산|고정) ^[^.,!\n]{0,12}우회""")
NEAR = either(r"^_(?:인근|주변|근처|부근|앞|옆|뒤|인접)")
WARNING = either(r"^_(?:주의보|경보|특보)")
MEASURED = (
    r"(?:시간당|누적|하루)(?:(?!비|눈)[^.!?\n]){1,20}$"  # "시간당 72mm 이상 매우 강한 비": it is falling
)
# nothing but a comma or an "and" between two words
LIST = r"^(?: ?(?:주의보|경보|특보))?(?:[\s,·/ㆍ+&및와과]|이나|또는|그리고|하고|함께)*$"
SENTENCE = r"[.!?\n](?!\d)"
