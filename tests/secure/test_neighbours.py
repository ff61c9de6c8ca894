"""The graph of neighbours: regular, symmetric, connected, and dense enough."""

import random
from fractions import Fraction

import pytest

from fedspallm_appfl.secure import neighbours
from fedspallm_appfl.secure.neighbours import degree, neighbourhoods, threshold


def reached(graph, left):
    """Clients among `left` that can be reached from the first of them."""
    found, todo = set(), [min(left)]
    while todo:
        found.add(one := todo.pop())
        todo += [other for other in graph[one] if other in left and other not in found]
    return found


@pytest.mark.parametrize(("clients", "k"), [(3, 2), (4, 3), (16, 15), (20, 6), (21, 20), (60, 46)])
def test_every_client_has_so_many_neighbours_who_have_it(clients, k):
    names = [f"c{i}" for i in range(clients)]
    graph = neighbourhoods(names, b"seed", k)
    assert {*graph} == {*names}
    for client, members in graph.items():
        assert len({*members}) == k + 1 and client in members and list(members) == sorted(members)
        assert all(client in graph[other] for other in members)
    assert reached(graph, {*names}) == {*names}


def test_the_graph_follows_from_names_and_seed():
    names = [f"c{i}" for i in range(30)]
    graph = neighbourhoods(names, b"seed", 8)
    assert neighbourhoods(names[::-1], b"seed", 8) == graph
    assert neighbourhoods(names, b"other", 8) != graph


@pytest.mark.parametrize("k", [0, 1, 5, 30, 31])
def test_no_graph_has_such_a_degree(k):
    with pytest.raises(ValueError, match=f"30 clients have 2, 4, ... or 29 neighbours, got {k}"):
        neighbourhoods([str(i) for i in range(30)], b"", k)


def test_small_federations_know_everybody_and_large_ones_few():
    assert [degree(n) for n in range(3, 24)] == list(range(2, 23))
    everybody = [n for n in range(24, 200) if degree(n) == n - 1]
    assert everybody == [25, 26, 27, 29, 30, 31, 33, 35, 37, 41, 45]
    assert degree(100) < 70 and degree(1000) < 150
    assert all(degree(n) % 2 == 0 for n in (100, 101, 1000))


def test_a_degree_is_the_smallest_that_is_safe():
    """The tails of the hypergeometric distribution term by term, as products of fractions instead of binomials."""

    def tail(total, marked, drawn, least):
        term = Fraction(1)  # none of the drawn is marked
        for i in range(drawn):
            term *= Fraction(max(total - marked - i, 0), total - i)
        sums = Fraction(0)
        for i in range(drawn + 1):
            sums += term if i >= least else 0
            below = (i + 1) * (total - marked - drawn + i + 1)
            term *= Fraction((marked - i) * (drawn - i), below) if below else 0
        return sums

    def safe(n, k):
        run = Fraction(1)
        for i in range(k // 2):
            run *= Fraction(n // 5 + n // 4 - i, n - i)
        half = k // 2 + 1
        return max(n * tail(n - 1, n // 5, k, half), n * run) <= Fraction(1, 2**40) and n * tail(
            n - 1, n // 4, k, k - half + 1
        ) <= Fraction(1, 2**30)

    for n in (100, 300):
        assert safe(n, degree(n)) and not safe(n, degree(n) - 2)


def test_honest_clients_stay_connected():
    """With a fifth of the clients on the server's side and a quarter gone, in graphs of the smallest safe degree."""
    names = [f"c{i:03}" for i in range(100)]
    draw = random.Random(0)
    for seed in range(20):
        graph = neighbourhoods(names, str(seed).encode(), degree(100))
        draw.shuffle(names)
        corrupt, left = {*names[:20]}, {*names[45:]}
        assert reached(graph, left) == left
        for members in graph.values():
            assert len(corrupt & {*members}) < threshold(len(members)) <= len({*members} - {*names[20:45]})


def test_two_halves_do_not_open_two_secrets():
    assert all(2 * threshold(n) > n for n in range(3, 100))
    assert threshold(3) == 2
    assert neighbours.SECRECY >= 40
