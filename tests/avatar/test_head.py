import numpy as np
import pytest
import torch

from avatar.errors import AvatarError
from avatar.head import HeadModel, load_head, rotation_matrices


def test_embedded_head_has_the_flame_layout(head):
    assert head.num_expressions == 50
    assert head.parent_list == [-1, 0, 1, 1, 1]
    assert head.weights.shape == (len(head.template), 5)
    assert torch.allclose(head.weights.sum(1), torch.ones(len(head.template)), atol=1e-4)
    assert head.faces.max() < len(head.template)
    assert set(head.part_names) == {"skin", "eyes", "teeth", "tongue", "shirt"}
    assert "jawOpen" not in head.expression_names
    assert head.expression_names == sorted(head.expression_names)


def test_expressions_leave_the_eyeballs_to_the_joints(head):
    eyes = head.vertex_parts == head.part_names.index("eyes")
    assert eyes.sum() == 144
    assert not head.expression_basis[eyes].any()
    blink = head.expression_basis[..., head.expression_names.index("eyeBlinkLeft")]
    assert blink.norm(dim=-1).max() > 0.005 * head.scale


def test_zero_parameters_give_the_template(head):
    posed = head(torch.zeros(2, 50), torch.zeros(2, 15))
    assert torch.allclose(posed, head.template.expand_as(posed), atol=1e-5)


def test_frames_of_a_batch_are_independent(head):
    expression, pose = torch.rand(3, 50), torch.randn(3, 15) * 0.2
    together = head(expression, pose)
    for row in range(3):
        assert torch.allclose(
            together[row], head(expression[row : row + 1], pose[row : row + 1])[0], atol=1e-5
        )


def test_jaw_opens_downwards_and_neck_turns_about_its_joint(head):
    pose = torch.zeros(1, 15)
    pose[0, 6] = 0.3
    tongue = head.vertex_parts == head.part_names.index("tongue")
    moved = head(torch.zeros(1, 50), pose)[0] - head.template
    assert moved[tongue, 1].mean() < -0.01 * head.scale
    pose = torch.zeros(1, 15)
    pose[0, 3:6] = torch.tensor([0.0, 0.5, 0.0])
    joint = head.joints[1]
    bones = head.bone_transforms(torch.zeros(1, 50), pose)[0]
    assert torch.allclose(bones[2, :, :3] @ joint + bones[2, :, 3], joint, atol=1e-5)


def test_rotation_matrices_are_rotations_and_differentiable_at_zero():
    vectors = torch.randn(20, 3, dtype=torch.float64)
    rotations = rotation_matrices(vectors)
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    assert torch.allclose(rotations @ rotations.mT, identity, atol=1e-12)
    assert torch.allclose(rotations, torch.linalg.matrix_exp(rotation_generators(vectors)), atol=1e-10)
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation_matrices, (zero,))


def rotation_generators(vectors):
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def test_shape_moves_template_and_joints(head):
    shape = torch.zeros(100)
    assert torch.equal(head.with_shape(shape).template, head.template)
    shape[int(head.joint_shape_basis.abs().amax((0, 1)).argmax())] = 1
    shaped = head.with_shape(shape)
    assert not torch.equal(shaped.template, head.template)
    assert not torch.equal(shaped.joints, head.joints)
    with pytest.raises(AvatarError, match="101 coefficients"):
        head.with_shape(torch.ones(101))


def test_pose_correctives_follow_the_rotations():
    random = np.random.default_rng(0)
    arrays = flame_like(random)
    model = HeadModel(arrays, scale=4.0)
    pose = torch.zeros(1, 15)
    assert torch.allclose(model(torch.zeros(1, 50), pose)[0], model.template, atol=1e-5)
    pose[0, 3:6] = torch.tensor([0.3, -0.2, 0.1])
    features = model.pose_features(pose)
    assert features.shape == (1, 36)
    expected = (rotation_matrices(pose[:, 3:6])[0] - torch.eye(3)).flatten()
    assert torch.allclose(features[0, :9], expected, atol=1e-6)
    assert not features[0, 9:].any()


def flame_like(random, vertices=20):
    """Random arrays of FLAME 2020's sizes, on fewer vertices."""
    weights = random.random((vertices, 5))
    return {
        "v_template": random.normal(size=(vertices, 3)) * 0.1,
        "expressions": random.normal(size=(vertices, 3, 50)) * 0.01,
        "posedirs": random.normal(size=(vertices, 3, 36)) * 0.01,
        "J": random.normal(size=(5, 3)) * 0.05,
        "weights": weights / weights.sum(1, keepdims=True),
        "parents": np.array([-1, 0, 1, 1, 1]),
        "faces": random.integers(0, vertices, (30, 3)),
    }


def test_load_head_names_what_a_file_lacks(tmp_path):
    path = tmp_path / "head.npz"
    np.savez(path, v_template=np.zeros((3, 3)))
    with pytest.raises(AvatarError, match=r"head\.npz: lacks J, expressions, faces"):
        load_head(path)
    path.write_text("no archive")
    with pytest.raises(AvatarError, match="not a readable head model"):
        load_head(path)
