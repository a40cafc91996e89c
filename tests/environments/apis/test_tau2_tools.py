from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym import datasets
from agentgym.environments.apis import tau2_data
from agentgym.environments.apis.tau2_data import Domain, domain, obtain
from agentgym.environments.apis.tau2_records import Records
from agentgym.environments.apis.tau2_tools import Desk, toolbox
from agentgym.errors import DataUnavailable, EnvironmentFailed, MissingData
from agentgym.messages import ToolCall

# What the benchmark's own tools (inspect-evals 0.26.0 with inspect_ai 0.3.285) leave of the gold calls: the
# SHA-256 of the sorted lines "<task> <SHA-256 of the changed records>".
REFERENCE = {
    "airline": "7823d1871e6047ee3a0b0e1b1c55a3a73bf89a3e8e7a41fd7ce7ff961dc955ab",
    "retail": "238558be7e3e1f923fffb259380485c9453afbe29df523229e583a9f78e653f3",
}


@pytest.fixture(scope="module", autouse=True)
def data(obtained: Callable[[str], Path]) -> Path:
    return obtained("tau2")


class Counter:
    """A desk, and its tools called by name."""

    def __init__(self, name: str) -> None:
        self.domain = domain(name)
        self.desk: Desk = self.domain.desk(Records(self.domain.base))
        self._tools = toolbox(self.desk)

    def __call__(self, tool: str, **arguments: Any) -> Any:
        result = self._tools.call(ToolCall(tool, arguments))
        assert result.ok, result.content
        return result.value

    def refusal(self, tool: str, **arguments: Any) -> str:
        before = self.desk.records.changes()
        result = self._tools.call(ToolCall(tool, arguments))
        assert not result.ok and self.desk.records.changes() == before
        return result.content


@pytest.fixture
def airline() -> Counter:
    return Counter("airline")


@pytest.fixture
def retail() -> Counter:
    return Counter("retail")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", REFERENCE)
def test_the_gold_calls_leave_what_the_benchmark_says(name: str):
    read = domain(name)
    lines = sorted(f"{case} {_sha(read.gold(case))}" for case in read.cases)
    assert _sha("\n".join(lines)) == REFERENCE[name]


def test_the_tools_are_the_benchmarks(airline: Counter, retail: Counter):
    assert len(list(toolbox(airline.desk))) == 14 and len(list(toolbox(retail.desk))) == 15
    for counter in (airline, retail):
        named = {call.name for case in counter.domain.cases.values() for call in case.calls}
        assert named <= {tool.name for tool in toolbox(counter.desk)}


# Airline -------------------------------------------------------------------------------------

FLIGHT = {"flight_number": "HAT001", "date": "2024-05-20"}


def booking(airline: Counter, **changed: Any) -> dict[str, Any]:
    """A booking of Mia Li's that is in order."""
    price = airline.desk.records.get("flights", "HAT001")["dates"]["2024-05-20"]["prices"]["economy"]  # type: ignore[index]
    return {
        "user_id": "mia_li_3668",
        "origin": "PHL",
        "destination": "LGA",
        "flight_type": "one_way",
        "cabin": "economy",
        "flights": [FLIGHT],
        "passengers": [{"first_name": "Mia", "last_name": "Li", "dob": "1990-04-05", "seat": "1A"}],
        "payment_methods": [{"payment_id": "credit_card_4421486", "amount": price + 30 + 50}],
        "total_baggages": 2,
        "nonfree_baggages": 1,
        "insurance": "yes",
        **changed,
    }


def test_a_booking_takes_seats_and_money(airline: Counter):
    arguments = booking(airline)
    price = arguments["payment_methods"][0]["amount"]
    arguments["payment_methods"] = [
        {"payment_id": "certificate_4856383", "amount": 80},
        {"payment_id": "credit_card_4421486", "amount": price - 80},
    ]
    seats = lambda: airline("search_direct_flight", origin="PHL", destination="LGA", date="2024-05-20")  # noqa: E731
    before = next(f for f in seats() if f["flight_number"] == "HAT001")["available_seats"]["economy"]
    booked = airline("book_reservation", **arguments)
    assert booked["reservation_id"] == "HATHAT" and booked["status"] is None
    assert booked["passengers"] == [{"first_name": "Mia", "last_name": "Li", "dob": "1990-04-05"}]
    after = next(f for f in seats() if f["flight_number"] == "HAT001")["available_seats"]["economy"]
    user = airline("get_user_details", user_id="mia_li_3668")
    assert after == before - 1 and user["reservations"][-1] == "HATHAT"
    assert "certificate_4856383" not in user["payment_methods"]  # what it was worth beyond 80 is lost


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"user_id": "nobody"}, "no user"),
        ({"flights": [{**FLIGHT, "flight_number": "HAT999"}]}, "no flight"),
        ({"flights": [{**FLIGHT, "date": "2024-06-20"}]}, "does not fly"),
        ({"flights": [{**FLIGHT, "date": "2024-05-03"}]}, "cannot be booked"),
        ({"payment_methods": [{"payment_id": "credit_card_0", "amount": 1}]}, "no payment method"),
        ({"payment_methods": [{"payment_id": "certificate_4856383", "amount": 101}]}, "does not hold"),
        ({"payment_methods": [{"payment_id": "certificate_4856383", "amount": 1}] * 2}, "used once"),
        ({"nonfree_baggages": 2}, "add up to"),
        ({"cabin": "first"}, "cabin"),
        ({"passengers": [{"first_name": "Mia"}]}, "last_name"),
    ],
)
def test_a_booking_that_is_not_in_order_is_refused(airline: Counter, changed: dict[str, Any], why: str):
    assert why in airline.refusal("book_reservation", **booking(airline, **changed))


def test_three_bookings_and_three_certificates_at_most(airline: Counter):
    for name in ("HATHAT", "HATHAU", "HATHAV"):
        assert airline("book_reservation", **booking(airline))["reservation_id"] == name
        airline("send_certificate", user_id="mia_li_3668", amount=50)
    assert "no more" in airline.refusal("book_reservation", **booking(airline))
    assert "more certificates" in airline.refusal("send_certificate", user_id="mia_li_3668", amount=50)


def test_a_cancellation_refunds_every_payment(airline: Counter):
    cancelled = airline("cancel_reservation", reservation_id="4WQ150")
    assert cancelled["status"] == "cancelled"
    assert [payment["amount"] for payment in cancelled["payment_history"]] == [4986, -4986]


def test_kept_flights_keep_their_price_and_the_rest_is_charged(airline: Counter):
    before = airline("get_reservation_details", reservation_id="4WQ150")
    kept, dropped = ({k: f[k] for k in ("flight_number", "date")} for f in before["flights"])
    same = {"reservation_id": "4WQ150", "cabin": "business", "payment_id": "gift_card_3576581"}
    assert airline("update_reservation_flights", flights=[kept, dropped], **same) == before
    balance = airline("get_user_details", user_id="chen_jackson_3290")["payment_methods"]
    assert (
        balance["gift_card_3576581"]["amount"]
        == domain("airline").base["users"]["chen_jackson_3290"]["payment_methods"]["gift_card_3576581"][
            "amount"
        ]
    )
    shorter = airline("update_reservation_flights", flights=[kept], **same)
    assert shorter["payment_history"][-1]["amount"] == -779 * 3 and len(shorter["flights"]) == 1


def test_a_certificate_pays_for_no_change_and_passengers_keep_their_number(airline: Counter):
    airline("send_certificate", user_id="chen_jackson_3290", amount=500)
    change = {"reservation_id": "4WQ150", "total_baggages": 9, "nonfree_baggages": 9}
    certificate = "certificate_3221322"
    assert "certificate" in airline.refusal("update_reservation_baggages", payment_id=certificate, **change)
    assert "3 passengers" in airline.refusal(
        "update_reservation_passengers", reservation_id="4WQ150", passengers=[]
    )


def test_one_stop_over_night_goes_on_the_next_day(airline: Counter):
    pairs = airline("search_onestop_flight", origin="SFO", destination="JFK", date="2024-05-20")
    nights = [two["date"] for one, two in pairs if "+1" in one["scheduled_arrival_time_est"]]
    assert {one["date"] for one, _ in pairs} == {"2024-05-20"} and set(nights) <= {"2024-05-21"}
    assert all(one["destination"] == two["origin"] for one, two in pairs) and pairs


@pytest.mark.parametrize(
    ("expression", "result"), [("2 + 2", "4.0"), ("1/3", "0.33"), ("(1+2)*3.5", "10.5"), (" 2**3 ", "8.0")]
)
def test_arithmetic(retail: Counter, expression: str, result: str):
    assert retail("calculate", expression=expression) == result


@pytest.mark.parametrize("expression", ["", "1/0", "9**9**9", "10**400", "abs(1)", "1,000", "(", "2 2"])
def test_arithmetic_that_is_none_is_refused(retail: Counter, expression: str):
    assert retail.refusal("calculate", expression=expression).startswith("Error: ")


# Retail --------------------------------------------------------------------------------------


def order(retail: Counter, status: str, paid_by: str = "") -> dict[str, Any]:
    """The first order of a status that was paid by a method of this kind."""
    return next(
        found
        for found in retail.desk.records.rows("orders")
        if found["status"] == status and found["payment_history"][0]["payment_method_id"].startswith(paid_by)
    )


def other_variants(retail: Counter, item: dict[str, Any]) -> list[str]:
    product = retail("get_product_details", product_id=item["product_id"])
    return [i for i, v in product["variants"].items() if v["available"] and i != item["item_id"]]


def test_a_cancelled_order_gives_a_gift_card_its_money_back(retail: Counter):
    found = order(retail, "pending", paid_by="gift_card")
    card, paid = found["payment_history"][0]["payment_method_id"], found["payment_history"][0]["amount"]
    before = retail("get_user_details", user_id=found["user_id"])["payment_methods"][card]["balance"]
    arguments = {"order_id": found["order_id"], "reason": "no longer needed"}
    cancelled = retail("cancel_pending_order", **arguments)
    after = retail("get_user_details", user_id=found["user_id"])["payment_methods"][card]["balance"]
    assert cancelled["status"] == "cancelled" and after == round(before + paid, 2)
    assert cancelled["payment_history"][-1]["transaction_type"] == "refund"
    assert "pending" in retail.refusal("cancel_pending_order", **arguments)


def test_every_replaced_item_takes_the_last_variants_price_as_in_the_benchmark(retail: Counter):
    found = next(
        found
        for found in retail.desk.records.rows("orders")
        if found["status"] == "pending"
        and len({item["item_id"] for item in found["items"]}) == len(found["items"]) > 1
        and all(other_variants(retail, item) for item in found["items"][:2])
    )
    items = found["items"][:2]
    new = [other_variants(retail, item)[0] for item in items]
    last = retail("get_product_details", product_id=items[1]["product_id"])["variants"][new[1]]
    made = retail(
        "modify_pending_order_items",
        order_id=found["order_id"],
        item_ids=[item["item_id"] for item in items],
        new_item_ids=new,
        payment_method_id=next(
            m
            for m in retail("get_user_details", user_id=found["user_id"])["payment_methods"]
            if not m.startswith("gift")
        ),
    )
    assert made["status"] == "pending (item modified)"
    assert [(i["item_id"], i["price"], i["options"]) for i in made["items"][:2]] == [
        (item_id, last["price"], last["options"]) for item_id in new
    ]


def test_a_refund_goes_to_what_paid_or_to_a_gift_card(retail: Counter):
    found = order(retail, "delivered")
    user = retail("get_user_details", user_id=found["user_id"])
    arguments = {"order_id": found["order_id"], "item_ids": [found["items"][0]["item_id"]]}
    paid_by = found["payment_history"][0]["payment_method_id"]
    for method in user["payment_methods"]:
        if method != paid_by and not method.startswith("gift_card"):
            assert paid_by in retail.refusal(
                "return_delivered_order_items", payment_method_id=method, **arguments
            )
    returned = retail("return_delivered_order_items", payment_method_id=paid_by, **arguments)
    assert (returned["status"], returned["return_items"]) == ("return requested", arguments["item_ids"])


@pytest.mark.parametrize(
    ("tool", "arguments", "why"),
    [
        ("get_order_details", {"order_id": "W2611340"}, "no order"),
        ("get_product_details", {"product_id": "1"}, "no product"),
        ("find_user_id_by_email", {"email": "x"}, "no user"),
        ("cancel_pending_order", {"order_id": "#W2611340", "reason": "no longer needed"}, "processed"),
        ("modify_user_address", {"user_id": "x" * 10_000}, "address1"),
    ],
)
def test_refusals_say_why(retail: Counter, tool: str, arguments: dict[str, Any], why: str):
    refusal = retail.refusal(tool, **arguments)
    assert why in refusal and len(refusal) < 1_000


def test_names_and_mails_are_found_in_any_case(retail: Counter):
    assert retail("find_user_id_by_email", email="NOAH.brown7922@example.com") == "noah_brown_6181"
    found = retail("find_user_id_by_name_zip", first_name="noah", last_name="BROWN", zip="80279")
    assert found == "noah_brown_6181"
    assert list(retail("list_all_product_types"))[:2] == ["Action Camera", "Air Purifier"]


# Records -------------------------------------------------------------------------------------


def test_changes_tell_states_apart_and_not_ways():
    base = {"users": {"a": {"amount": 50.0}, "b": {"amount": 1.0}}}
    one, two = Records(base), Records(base)
    one.edit("users", "a")["amount"] = 7.0
    assert one.changes() != two.changes() == "{}"
    fork = one.copy()
    fork.edit("users", "a")["amount"] = 50.0
    assert fork.changes() == "{}" and one.get("users", "a") == {"amount": 7.0}
    fork.edit("users", "a")["amount"] = 50  # as the benchmark's hash, which reads JSON
    assert fork.changes() != "{}"
    one.add("users", "c", {"amount": 2.0})
    assert [row["amount"] for row in one.rows("users")] == [7.0, 1.0, 2.0] and list(base["users"]) == [
        "a",
        "b",
    ]
    assert one.get("users", "c") == {"amount": 2.0} and one.get("users", "d") is None


# The data set --------------------------------------------------------------------------------


def test_without_the_data_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import agentgym

    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path))
    env: Any = agentgym.make("Tau2-Airline-v0").unwrapped
    for ask in (lambda: env.tasks("test"), env.reset):
        with pytest.raises(MissingData) as raised:
            ask()
        assert raised.value.hint == "agentgym data get tau2"
    env.close()


def test_another_wheel_is_refused(tmp_path: Path):
    wheel = tmp_path / "inspect_evals-0.26.0-py3-none-any.whl"
    wheel.write_bytes(b"another")
    with pytest.raises(DataUnavailable, match="hashes to"):
        obtain(tmp_path / "made", lambda done, total: None, wheel)
    assert wheel.exists()


def test_only_what_is_needed_is_kept(data: Path):
    kept = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    files = ("db.json.gz", "policy.txt", "split_tasks.json", "tasks.json")
    assert kept == {"LICENSE", "NOTICE", *(f"{d}/{f}" for d in ("airline", "retail") for f in files)}
    assert datasets.known()["tau2"].licence == "MIT"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tasks.json", b"[{"),
        ("tasks.json", b'[{"id": "0"}]'),
        ("split_tasks.json", b'{"train": ["77"], "test": []}'),
        ("db.json.gz", b"no gzip"),
        ("db.json.gz", gzip.compress(b'{"users": {"a": {}}}', mtime=0)),
    ],
)
def test_damaged_data_are_no_zero_reward(data: Path, tmp_path: Path, file: str, damage: bytes):
    folder = tmp_path / "airline"
    shutil.copytree(data / "airline", folder)
    (folder / file).write_bytes(damage)
    with pytest.raises(EnvironmentFailed, match="damaged"):
        _ = Domain("airline", folder).base


def test_a_basis_that_needs_a_judge_is_not_passed_over(data: Path, tmp_path: Path):
    folder = tmp_path / "airline"
    shutil.copytree(data / "airline", folder)
    tasks = json.loads((folder / "tasks.json").read_text())
    tasks[0]["evaluation_criteria"]["reward_basis"] = ["DB", "NL_ASSERTION"]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(EnvironmentFailed, match="NL_ASSERTION"):
        Domain("airline", folder)
    assert tau2_data.BASIS == ("DB", "COMMUNICATE")
