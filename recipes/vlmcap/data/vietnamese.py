"""Cleaning of Vietnamese captions, for `clean.CaptionCleaner`: named rules, decided on UIT-ViIC's 19,256 captions.

What the annotators wrote stays as it is: a small first letter, a missing final full stop, English words (tennis),
regional words (banh, dĩa, dù), wordings that are odd but may be meant. A typing mistake is fixed only where no
other reading is left: a word that Vietnamese does not have, or one that makes no sense in its phrase ("cầm vợ tennis"
holds a tennis wife, "cầm vợt tennis" a racket).
"""

import unicodedata

import regex

from vlmcap.data.clean import MARKUP, TextRule, drop_control

_WORD = r"[\p{L}\p{M}]"

# Spacing -----------------------------------------------------------------------------------------------------------
# Most captions of UIT-ViIC were published as a tokeniser left them: "Một cậu bé đang đá bóng ."
_SPACES = regex.compile(r"\s+")
_SPACE_BEFORE_MARK = regex.compile(r" +(?=[.,;:!?])")


def _space(text: str) -> str:
    return _SPACE_BEFORE_MARK.sub("", _SPACES.sub(" ", text).strip(" "))


# Capitals ----------------------------------------------------------------------------------------------------------
# A Shift key held too long: HÌnh, MỘt, nGười. Words of ASCII letters may be names (TV, iPhone).
_WORDS = regex.compile(f"{_WORD}+")


def _fix_capitals(text: str) -> str:
    def fix(match: regex.Match) -> str:
        word = match[0]
        return word if word.isascii() or word.isupper() else word[0] + word[1:].lower()

    return _WORDS.sub(fix, text)


# Tone marks --------------------------------------------------------------------------------------------------------
# Two conventions: hoá or hóa. UIT-ViIC writes 27 to 4 on the second vowel. In "qu" the u belongs to the consonant.
_TONES = "\u0300\u0301\u0303\u0309\u0323"
_EARLY_MARK = regex.compile(
    rf"(?i)(?:(?<=o)([{_TONES}])([ae])|(?<=(?<!q)u)([{_TONES}])(y))(?!{_WORD})|(?<=qu)([{_TONES}])(\p{{L}}\p{{M}}*)"
)


def _place_tone_marks(text: str) -> str:
    def later(match: regex.Match) -> str:
        mark, vowel = (group for group in match.groups() if group)
        return vowel + mark

    return unicodedata.normalize("NFC", _EARLY_MARK.sub(later, unicodedata.normalize("NFD", text)))


# Typos -------------------------------------------------------------------------------------------------------------
# wrong > right; whole words, any case. Most are keystrokes of Telex that stayed (vowjt for vợt), a neighbouring key, a
# lost or wrong mark, or a space in the wrong place.
_TYPOS = """
bij > bị; bj > bị; bịu > bị; bogn > bóng; bosnbg > bóng; bsong > bóng; tbosng > bóng; bóngc > bóng;
bém bóng > ném bóng; ngém bóng > ném bóng; búng chày > bóng chày; chơi bòng > chơi bóng; thủ bòng > thủ bóng;
bóng chay > bóng chày; bóng cày > bóng chày; bóng chà > bóng chày; chơi bóng cvhafy > chơi bóng chày;
bóng chafytreen > bóng chày trên; bóng đấ > bóng đá; đa bóng > đá bóng; phát bong > phát bóng; đá bong > đá bóng;
ném bón. g > ném bóng.; đám đôn. g > đám đông.; bón bàn > bóng bàn; bóng rỏ > bóng rổ; bóng rỗ > bóng rổ;
với quá bóng > với quả bóng; những quá bóng > những quả bóng; qảu bóng > quả bóng; ảu bóng > quả bóng;
bát bóng > bắt bóng; bẳt > bắt; dỡ bóng > đỡ bóng; đơ bóng > đỡ bóng; đán bóng > đánh bóng; đánn > đánh;
đanh bóng > đánh bóng; đanh tranh > đang tranh; đanh đánh > đang đánh; thủ đáng bóng > thủ đánh bóng;
vợt đáng bóng > vợt đánh bóng; bị đáng bóng > bị đánh bóng; nữ đáng cầm > nữ đang cầm; đánht rả > đánh trả;
nhối bóng > nhồi bóng; chuần > chuẩn; chuản > chuẩn; bươc > bước; caaju > cậu; caon > con;
một côn hải cẩu > một con hải cẩu; von voi > con voi; tró > chó; chajky > chạy; chajy > chạy; chgajy > chạy;
chay về > chạy về; chạy them > chạy theo; chạy tơi > chạy tới; towdi > tới; chôi > chơi; choi > chơi; chươi > chơi;
chwoi > chơi; chơi đừa > chơi đùa; đang chói bóng > đang chơi bóng; màu chắng > màu trắng; cvhujp hình > chụp hình;
chụp hính > chụp hình; cùn nhau > cùng nhau; cùng nahu > cùng nhau; cầy thủ > cầu thủ; càu thủ > cầu thủ;
cầu thu đánh > cầu thủ đánh; cầu thut > cầu thủ; cầu thủe > cầu thủ; nữ cậu thủ > nữ cầu thủ;
cầu thú bắt > cầu thủ bắt; c ầm > cầm; cẩm quả > cầm quả; đang càm > đang cầm; câm vợt > cầm vợt; cầm vợ > cầm vợt;
vung vợ > vung vợt; vợt vá bóng > vợt và bóng; vung vọt > vung vợt; cầm gợt > cầm vợt; vơt > vợt;
vợi tennis > vợt tennis; vbowjt > vợt; vopwjt > vợt; bằn gvowjt > bằng vợt; gaajy > gậy; cây gận > cây gậy;
vung ậy > vung gậy; vung vậy > vung gậy; cẩn cẩu > cần cẩu; cậy bé > cậu bé; câu bé > cậu bé; cời trần > cởi trần;
ddeo > đeo; ddaaasu > đấu; áo den > áo đen; ảo đỏ > áo đỏ; ảo đen > áo đen; áo đó đang > áo đỏ đang;
áo đó đeo > áo đỏ đeo; áo hòng > áo hồng; áo trăng > áo trắng; áo xang > áo xanh; áo só > áo số; áu màu > áo màu;
asot rắng > áo trắng; đàn ông á trắng > đàn ông áo trắng; áo trawqsng > áo trắng; xanh dướng > xanh dương; omafu > màu;
đám dodng > đám đông; đám đong > đám đông; tạo dán > tạo dáng; tạo dánh > tạo dáng; tạo dạng > tạo dáng;
dùn gòi > dùng vòi; bằng vời > bằng vòi; theo dĩ > theo dõi; thoe > theo; dưa vợt > đưa vợt; trên dất > trên đất;
trên đát > trên đất; trận dấu > trận đấu; trận đáu > trận đấu; thi đáu > thi đấu; thi đắu > thi đấu; thi đấn > thi đấu;
thi đấ > thi đấu; trận thị đấu > trận thi đấu; tthi đấu > thi đấu; traajn > trận; trạn bóng > trận bóng;
hai dội > hai đội; đội mủ > đội mũ; đọi nón > đội nón; cùng đột > cùng đội; gbay > bay; đàn ôn gáo > đàn ông áo;
đàn ôn > đàn ông; đàn ônng > đàn ông; đàn oông > đàn ông; đàn ồng > đàn ông; đàng ông > đàn ông; dàn ông > đàn ông;
đfan ông > đàn ông; đànông > đàn ông; khán gải > khán giả; khan giả > khán giả; khản giả > khán giả;
hadng rào > hàng rào; hào rào > hàng rào; hiệ > hiện; hưỡng dẫn > hướng dẫn; khunng > khung; luyên tập > luyện tập;
luyệ > luyện; mọt người > một người; môt > một; mốt số > một số; một sô người > một số người; bới hai > bởi hai;
trời mứa > trời mưa; trới nắng > trời nắng; trời tổi > trời tối; măc > mặc; mặc quàn > mặc quần; namd > nam;
ndma > nam; nma > nam; nsm > nam; nghiejp > nghiệp; ngiêng > nghiêng; nguwfoi > người; nguwofi > người; nguời > người;
ngườ > người; ngườin > người; ngưỡi > người; ngươi > người; ngòi > ngồi; nogafi > ngoài; noài > ngoài;
ngoài vường > ngoài vườn; đang nàm > đang nằm; nhwuxng > những; những đứ trẻ > những đứa trẻ; vậ nđộng > vận động;
vnaja > vận; vậnd > vận; vân động > vận động; vận dộng > vận động; vận đọng > vận động; chuyển dộng > chuyển động;
vận độn > vận động; động viêng > động viên; độngt ác > động tác; phụ nữa > phụ nữ; phj > phụ; phụi > phụ;
hụ nữ > phụ nữ; pụ nữ > phụ nữ; nữu > nữ; phụ huỵnh > phụ huynh; phsia > phía; vè phía > về phía; vìa phía > về phía;
vợt ve phía > vợt về phía; qurng > quảng; quan sat > quan sát; quan sất > quan sát; diễn ran > diễn ra;
thi đấu rên > thi đấu trên; đứa rẻ > đứa trẻ; đứa tẻ > đứa trẻ; đứa tre > đứa trẻ; trên sâ > trên sân; sânl > sân;
sânn > sân; trên sâm > trên sân; trên san > trên sân; trên sấn > trên sân; bước san > bước sang; sắn sàng > sẵn sàng;
máy sẩy > máy sấy; máy xấy > máy sấy; vào bỏng > vào bóng; teay > tay; teinnis > tennis; teninis > tennis;
tenni > tennis; tenní > tennis; tenns > tennis; tenins > tennis; tennsi > tennis; tenis > tennis; tennnis > tennis;
trennis > tennis; tennistrên > tennis trên; tư thê > tư thế; thưc > thực; thựa hiện > thực hiện; tren > trên;
treen > trên; trến ân > trên sân; trến > trên; trển > trên; ỏ trên > ở trên; trướn > trườn; tượt > trượt;
tâm lưới > tấm lưới; tiếp xusc > tiếp xúc; vơi đứa > với đứa; vơi đám > với đám; vơi đông > với đông;
vơi cầu > với cầu; đangvung > đang vung; đangt > đang; đant > đang; đanng > đang; đnag > đang; đng > đang; đsng > đang;
đâng > đang; dang theo > đang theo; dang thi > đang thi; dang di > đang di; dang dắt > đang dắt; dang vung > đang vung;
dang dùng > đang dùng; dang chạy > đang chạy; dang đứng > đang đứng; dang luyện > đang luyện; dang chơi > đang chơi;
dang nhảy > đang nhảy; đàng chơi > đang chơi; bóng đàng cầm > bóng đang cầm; đượt đặt > được đặt; đứn > đứng;
đứbg > đứng; đứung > đứng; đặg trên > đặt trên; điểu khiển > điều khiển; bảo vè > bảo vệ; cuớp > cướp;
dụng cự > dụng cụ; đồ nhực > đồ nhựa; gấu bống > gấu bông; trong chuồn > trong chuồng; chuống > chuồng;
trong lồn > trong lồng; bải biển > bãi biển; núi,, ột nhóm > núi, một nhóm; bi - a > bi-a
"""
TYPOS = dict(entry.strip().split(" > ") for entry in _TYPOS.replace("\n", " ").split(";"))
_LONGEST_FIRST = "|".join(regex.escape(wrong) for wrong in sorted(TYPOS, key=len, reverse=True))
_TYPO = regex.compile(f"(?i)(?<!{_WORD})(?:{_LONGEST_FIRST})(?!{_WORD})")


def _fix_typos(text: str) -> str:
    def fix(match: regex.Match) -> str:
        right = TYPOS[match[0].lower()]
        return right[0].upper() + right[1:] if match[0][0].isupper() else right

    return _TYPO.sub(fix, text)


# A word typed again; not a rule for all words, since some are meant (từ từ, đồ chơi chơi, bóng đá đá bóng).
_TWICE = regex.compile(rf"(?i)(?<!{_WORD})(bóng|của|đánh|để|người|ông)(?: \1)+(?!{_WORD})")


def _drop_repeated(text: str) -> str:
    return _TWICE.sub(r"\1", text)


# The end of the caption --------------------------------------------------------------------------------------------
# Keys beside the one for the full stop, in its place or after it: "trên sân /", "đánh bóng. ]", "giao bóng.,"; and a
# lone letter or digit after it: "ngang. 1".
_STRAY_MARKS = regex.compile(r"(?<=[\p{L}\p{M}\p{N}])(?!\.$|\.\.\.$)[ .,;/`\]]+$")
_STRAY_LETTER = regex.compile(rf"(?<={_WORD}{{2}}\.) ?[\p{{Ll}}\p{{N}}]$")


def _drop_stray(text: str) -> str:
    return _STRAY_LETTER.sub("", _STRAY_MARKS.sub(".", text))


_FRAGMENT = regex.compile(rf"\W*{_WORD}*\W*")

TEXT_RULES = (
    TextRule("control", "control, zero-width, private-use and broken characters removed", drop_control),
    TextRule("unicode", "letters and tone marks composed (NFC)", lambda text: unicodedata.normalize("NFC", text)),
    MARKUP,
    TextRule("spacing", "one space between words, none before . , ; : ! ? or at the ends (also tabs)", _space),
    TextRule("capitals", "capitals of a Shift key held too long (MỘt, nGười) become small", _fix_capitals),
    TextRule(
        "tone_marks",
        "the mark is on the second vowel of final oa, oe, uy, and never on the u of qu",
        _place_tone_marks,
    ),
    TextRule("typos", f"{len(TYPOS)} certain misspellings fixed (list in vlmcap/data/vietnamese.py)", _fix_typos),
    TextRule("repeated_word", "của, để, bóng, đánh, người or ông typed twice in a row becomes one", _drop_repeated),
    TextRule("stray_end", "/ ] ` ; , . and lone letters after the last word or full stop removed", _drop_stray),
    TextRule(
        "fragment",
        "a lone word or sign, left by a typing mistake, is not a caption",
        lambda text: "" if _FRAGMENT.fullmatch(text) else text,
    ),
)
